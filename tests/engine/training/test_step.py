"""The step over meshes, accumulation and precisions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.config.dpo import DPOConfig
from engine.data.batches import BatchPlan, Order
from engine.data.layouts import Layout
from engine.data.tokenization import ragged_arange
from engine.objective.references import mix_parameters
from engine.parallel.batch import put_batch
from engine.training.metrics import means
from engine.training.prepare import loss_options, step_options
from engine.training.reference import make_reference
from engine.training.step import (
    make_eval_step,
    split_model,
)
from tests.engine.training.step_runs import (
    BETA,
    assert_same,
    make_pairs,
    model_on,
    run,
    sum_error,
)

# All axes at once; a vocabulary of which the last device has almost nothing. (1, 2, 4),
# where devices share a kv head, is in test_arrangements.py.
MESHES = [pytest.param((2, 2, 2), marks=pytest.mark.numerics), (1, 8, 1)]


@pytest.fixture(scope="module")
def one_device():
    return run((1, 1, 1))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_meshes_agree(sizes, one_device):
    assert_same(run(sizes), one_device)


def test_the_comparison_would_notice(one_device):
    """Another beta, and other pairs, are outside the tolerance."""
    with pytest.raises(AssertionError, match="loss|rewards"):
        assert_same(run((1, 1, 1), beta=0.2002), one_device)
    with pytest.raises(AssertionError):
        assert_same(run((1, 1, 1), pairs=make_pairs(48, seed=1)), one_device)


def test_accumulation_equals_the_whole_batch(one_device):
    """On several devices; on one, in four microbatches: test_arrangements.py."""
    assert_same(run((2, 2, 2), gradient_accumulation_steps=2), one_device)


def test_a_run_with_small_moments_stays_near(one_device):
    """What the parameters are off by is as good as random: right on average, and of one
    number not that of another. So a loss is off by a normal number, whose deviation is
    the gradient's norm times the parameters' (a root mean square)."""
    got = run((1, 1, 1), mu_dtype="8bit", nu_dtype="8bit")
    leaves = zip(*map(jax.tree.leaves, (got.params, one_device.params)), strict=True)
    off = np.concatenate([np.ravel(x - y) for x, y in leaves])
    deviation = np.sqrt(np.mean(np.square(off, dtype=np.float64)))
    # Three updates of about the learning rate, of which the first is exact.
    assert 0 < deviation < 0.01
    for line, wanted in zip(got.lines, one_device.lines, strict=True):
        bound = 5 * wanted["grad_norm"] * deviation + 1e-6
        assert line["loss"] == pytest.approx(wanted["loss"], abs=bound)
        assert line["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.02)


def test_padding_pairs_weigh_nothing():
    """Sixteen places for three pairs; of several devices some have none."""
    pairs = make_pairs(3)  # a single batch
    want = run((1, 1, 1), pairs=pairs, total_batch_size=3)
    alone = run((1, 1, 1), pairs=pairs)
    assert alone.pairs == want.pairs == 3
    assert_same(alone, want)
    assert_same(run((2, 2, 2), pairs=pairs), want)


def test_a_weight_counts_as_so_many_pairs():
    pairs = make_pairs(3)
    sequences = np.array([0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 4, 5])
    index = ragged_arange(pairs.offsets[sequences], pairs.lengths[sequences])
    fields = {x: getattr(pairs, x)[index] for x in ("tokens", "scored")}
    fields["completion_start"] = pairs.completion_start[sequences]
    fields["offsets"] = np.append(0, np.cumsum(pairs.lengths[sequences]))
    repeated = dataclasses.replace(make_pairs(6), **fields)
    pairs = dataclasses.replace(pairs, weights=np.array([1, 2, 3], np.float32))
    want = run((1, 1, 1), pairs=repeated)
    assert want.pairs == 6  # in a single batch, as the three are
    assert_same(run((1, 1, 1), pairs=pairs), want)
    assert_same(run((2, 2, 2), pairs=pairs), want)


@pytest.mark.parametrize(
    "sizes, remat",
    [
        pytest.param((1, 1, 1), "none", marks=pytest.mark.numerics),
        ((2, 2, 2), "full"),
    ],
    ids=str,
)
def test_margins_start_at_zero_to_the_rounding_of_the_sums(sizes, remat):
    """The policy and the reference are the same in bfloat16, though one is under
    autodiff and the other is not; compilers may add the same numbers in two orders."""
    options = {"dtype": "bfloat16", "remat": remat}
    line = run(sizes, steps=1, seeds=(0,), model_options=options).lines[0]
    bound = BETA * sum_error(line)
    assert bound < 1e-5
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(line[name]) <= bound, name
    assert line["loss"] == pytest.approx(np.log(2), abs=bound)


def test_evaluation_gives_the_sums_of_the_training_step():
    """In two microbatches, where the step has the whole batch at once."""
    config = DPOConfig(total_batch_size=16, beta=BETA)
    model, other = model_on((2, 2, 2)), model_on((2, 2, 2), seed=1)
    pairs = make_pairs(48)
    plan = BatchPlan(Order(num_pairs=48, pairs_per_batch=16), Layout(pairs, 16, 2, 4))
    batch, _ = next(plan.batches())
    reference = make_reference(model, other, config)
    evaluate = make_eval_step(model, reference, step_options(config))
    _, params, frozen = split_model(model)
    sums = evaluate(
        params,
        frozen,
        reference.operands,
        put_batch(batch, model.mesh),
        jax.tree.map(jnp.float32, loss_options(config)),
    )
    trained = run((2, 2, 2)).lines[0]
    assert sums.weights["pairs"] == 16
    for name, value in means(sums).items():
        np.testing.assert_allclose(value, trained[name], rtol=1e-5, atol=1e-5)


def test_without_a_reference_and_with_clipping():
    """One step of both, which have nothing to do with each other."""
    ran = run(
        (1, 1, 1),
        batches=1,
        seeds=(0,),
        reference_free=True,
        adam_epsilon=1.0,
        max_grad_norm=1e-3,
        learning_rate=1.0,
    )
    (line,) = ran.lines
    # No reference scores as zeros.
    rewards = BETA * line["logps/chosen"]
    assert line["rewards/chosen"] == pytest.approx(rewards, rel=1e-6)
    # Plain Adam does not see a scale of g, but its epsilon does: here it dominates.
    assert line["grad_norm"] > 0.1  # of the gradient before it is clipped
    start = jax.device_get(split_model(model_on((1, 1, 1)))[1])
    moved = jax.tree.map(lambda a, b: np.square(a - b).sum(), ran.params, start)
    # The first update is g / (|g| + 1), about g for a small g.
    change = np.sqrt(sum(jax.tree.leaves(moved)))
    assert change == pytest.approx(1e-3, rel=0.01)


def test_the_reference_follows_the_policy():
    policy, reference = {"w": jnp.ones(3)}, {"w": jnp.zeros(3)}
    mixed = mix_parameters(reference, policy, alpha=0.25)
    np.testing.assert_array_equal(mixed["w"], np.full(3, 0.25))
