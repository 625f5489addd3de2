"""The step over meshes, accumulation and precisions."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.config.dpo import DPOConfig
from engine.data.batches import BatchPlan, Order, Padded
from engine.data.tokenization import PairTokens, ragged_arange
from engine.models import Decoder, init_model, parse_hf_config
from engine.objective.references import mix_parameters
from engine.parallel.batch import put_batch
from engine.parallel.sharding import make_mesh
from engine.training.metrics import means
from engine.training.optimizer import make_optimizer
from engine.training.prepare import loss_options, step_options
from engine.training.reference import make_reference
from engine.training.schedules import learning_rate_schedule
from engine.training.step import (
    init_state,
    make_eval_step,
    make_train_step,
    split_model,
)

# An odd vocabulary, padded on every mesh; one kv head for every four devices' heads.
CONFIG = parse_hf_config(
    {
        "model_type": "gemma2",
        "vocab_size": 201,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "initializer_range": 0.3,
    }
)
MESHES = [
    (8, 1, 1),
    pytest.param((1, 8, 1), marks=pytest.mark.numerics),
    pytest.param((2, 2, 2), marks=pytest.mark.numerics),
    (1, 2, 4),
]
BETA = 0.2
# Rows of 24 tokens, 256 of a shard's scored: any 16 pairs fit, so runs share programs.
SHAPE = (24, 256)
EPS = float(np.finfo(np.float32).eps)


def make_pairs(count: int, seed: int = 0) -> PairTokens:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 23, 2 * count)
    # Some completions are all but one token, some a single one.
    starts = np.array([rng.integers(1, n) for n in lengths], np.int32)
    return PairTokens(
        tokens=rng.integers(0, 201, lengths.sum()).astype(np.int32),
        scored=ragged_arange(0 * lengths, lengths) >= np.repeat(starts, lengths),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        completion_start=starts,
        rows=np.arange(count),
        weights=np.ones(count, np.float32),
    )


def model_on(sizes: tuple[int, int, int], seed: int = 0, **kwargs) -> Decoder:
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    kwargs = {"dtype": "float32"} | kwargs
    return init_model(CONFIG, mesh=mesh, seed=seed, **kwargs)


class Ran(NamedTuple):
    lines: list[dict[str, float]]  # the metrics of each step
    pairs: int  # of a step
    params: dict  # the final ones, as the host sees them


@functools.cache
def compiled(sizes, seeds, model_options, settings, steps):
    """The jitted step and what it is called with; runs that differ in numbers share it.

    Both are made from scratch for a call, since a run uses its arrays up.
    """
    config = DPOConfig(**dict(settings))

    def make():
        model = model_on(sizes, seeds[0], **dict(model_options))
        given = None
        if len(seeds) > 1:
            given = model_on(sizes, seeds[1], **dict(model_options))
        return model, make_reference(model, given, config)

    model, reference = make()
    optimizer = make_optimizer(config, model.config, model.mesh, steps)
    schedule = learning_rate_schedule(config, steps)
    step = make_train_step(model, reference, optimizer, schedule, step_options(config))
    return config, step, optimizer, make


def run(
    sizes,
    *,
    pairs=None,
    steps=3,  # of the schedule, which is compiled in
    batches=None,  # after which to stop; None: of all pairs
    seeds=(0, 1),
    beta=BETA,
    model_options=None,
    **more,
) -> Ran:
    settings = {"total_batch_size": 16, "learning_rate": 1e-2, "beta": BETA} | more
    config, step, optimizer, make = compiled(
        sizes,
        seeds,
        tuple((model_options or {}).items()),
        tuple(settings.items()),
        steps,
    )
    model, reference = make()
    pairs = make_pairs(16 * steps) if pairs is None else pairs
    size, accumulation = config.total_batch_size, config.gradient_accumulation_steps
    plan = BatchPlan(
        Order(num_pairs=len(pairs), pairs_per_batch=size),
        Padded(pairs, size, accumulation, sizes[0] * sizes[1]),
    )
    plan.shapes = (SHAPE,)
    state, frozen = init_state(model, optimizer), split_model(model)[2]
    numbers = jax.tree.map(
        jnp.float32, loss_options(DPOConfig(**{**settings, "beta": beta}))
    )
    lines, weights = [], []
    for batch, _ in itertools.islice(plan.batches(), batches):
        state, out = step(
            state, frozen, reference.operands, put_batch(batch, model.mesh), numbers
        )
        assert out.finite
        lines.append(means(out.sums) | {"grad_norm": float(out.grad_norm)})
        weights.append(int(out.sums.weights["pairs"]))
    params = jax.tree.map(np.asarray, jax.device_get(state.params))
    return Ran(lines, weights[-1], params)


@pytest.fixture(scope="module")
def one_device():
    return run((1, 1, 1))


def sum_error(line: dict[str, float]) -> float:
    """How far a mean log-probability of a sequence may be off, in nats.

    Each is a sum over tokens, in an order that depends on the mesh and the compiler:
    some units in the last place of the sum.
    """
    return 4 * EPS * max(abs(line["logps/chosen"]), abs(line["logps/rejected"]))


def assert_same(got: Ran, want: Ran, rtol=2e-5):
    """To float32 rounding: of three steps, of which Adam's first divides g by |g|.

    Rewards and margins are differences of sums of log-probabilities, and are as good as
    those sums: their bound is made of the sums, not of the difference.
    """
    for line, wanted in zip(got.lines, want.lines, strict=True):
        difference = 4 * BETA * sum_error(wanted)
        for name, value in wanted.items():
            atol = difference if name.startswith("rewards/") else 1e-6
            if (
                name.startswith("log_ratio/") or name == "centre"
            ):  # of sums, in nats a token
                atol = sum_error(wanted)
            np.testing.assert_allclose(
                line[name], value, rtol=rtol, atol=atol, err_msg=name
            )
    leaves = jax.tree.leaves(got.params), jax.tree.leaves(want.params)
    for a, b in zip(*leaves, strict=True):
        kept = tuple(slice(0, min(x, y)) for x, y in zip(a.shape, b.shape, strict=True))
        np.testing.assert_allclose(a[kept], b[kept], rtol=1e-3, atol=2e-4)


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
    assert_same(run((1, 1, 1), gradient_accumulation_steps=4), one_device)
    assert_same(run((2, 2, 2), gradient_accumulation_steps=2), one_device)


def test_padding_pairs_weigh_nothing():
    """Sixteen places for three pairs, alone and over eight devices."""
    pairs = make_pairs(3)  # a single batch
    want = run((1, 1, 1), pairs=pairs, total_batch_size=3)
    alone = run((1, 1, 1), pairs=pairs)
    assert alone.pairs == want.pairs == 3
    assert_same(alone, want)
    assert_same(run((8, 1, 1), pairs=pairs), want)


def test_a_weight_counts_as_so_many_pairs():
    pairs = make_pairs(3)
    sequences = np.array([0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 4, 5])
    index = ragged_arange(pairs.offsets[sequences], pairs.lengths[sequences])
    fields = {x: getattr(pairs, x)[index] for x in ("tokens", "scored")}
    fields["completion_start"] = pairs.completion_start[sequences]
    fields["offsets"] = np.append(0, np.cumsum(pairs.lengths[sequences]))
    repeated = dataclasses.replace(make_pairs(6), **fields)
    pairs = dataclasses.replace(pairs, weights=np.array([1, 2, 3], np.float32))
    want = run((1, 1, 1), pairs=repeated, steps=1)
    assert_same(run((1, 1, 1), pairs=pairs, steps=1), want)
    assert_same(run((2, 4, 1), pairs=pairs, steps=1), want)


@pytest.mark.parametrize(
    "sizes, remat",
    [
        pytest.param((1, 1, 1), "none", marks=pytest.mark.numerics),
        pytest.param((2, 2, 2), "dots", marks=pytest.mark.numerics),
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


def test_no_reference_scores_as_zeros():
    line = run((1, 1, 1), steps=1, seeds=(0,), reference_free=True).lines[0]
    rewards = BETA * line["logps/chosen"]
    assert line["rewards/chosen"] == pytest.approx(rewards, rel=1e-6)


def test_evaluation_gives_the_sums_of_the_training_step():
    """In two microbatches, where the step has the whole batch at once."""
    config = DPOConfig(total_batch_size=16, beta=BETA)
    model, other = model_on((2, 2, 2)), model_on((2, 2, 2), seed=1)
    pairs = make_pairs(48)
    plan = BatchPlan(Order(num_pairs=48, pairs_per_batch=16), Padded(pairs, 16, 2, 4))
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


def test_clipping_bounds_the_update(one_device):
    """Plain Adam does not see a scale of g, but its epsilon does: here it dominates."""
    clipped = run(
        (1, 1, 1), batches=1, adam_epsilon=1.0, max_grad_norm=1e-3, learning_rate=1.0
    )
    norm = clipped.lines[0]["grad_norm"]  # of the gradient before it is clipped
    assert norm == pytest.approx(one_device.lines[0]["grad_norm"], rel=1e-5)
    assert norm > 0.1
    start = jax.device_get(split_model(model_on((1, 1, 1)))[1])
    moved = jax.tree.map(lambda a, b: np.square(a - b).sum(), clipped.params, start)
    # The first update is g / (|g| + 1), about g for a small g.
    change = np.sqrt(sum(jax.tree.leaves(moved)))
    assert change == pytest.approx(1e-3, rel=0.01)


def test_the_reference_follows_the_policy():
    policy, reference = {"w": jnp.ones(3)}, {"w": jnp.zeros(3)}
    mixed = mix_parameters(reference, policy, alpha=0.25)
    np.testing.assert_array_equal(mixed["w"], np.full(3, 0.25))
