"""Losses that compare pairs, parameters that are not trained, low precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.config.dpo import DPOConfig
from engine.data.batches import BatchPlan, Order
from engine.data.layouts import Layout
from engine.models.architecture import DecoderConfig
from engine.objective.interface import LossOut
from engine.objective.losses import LOSSES, Loss
from engine.parallel.batch import put_batch
from engine.training.metrics import means
from engine.training.optimizer import (
    add_updates,
    make_optimizer,
    round_at_random,
)
from engine.training.prepare import loss_options, step_options
from engine.training.reference import make_reference
from engine.training.schedules import learning_rate_schedule
from engine.training.step import init_state, make_train_step, split_model
from tests.engine.training.step_runs import assert_same, make_pairs, model_on, run


def centred(logps, options):
    """The margins against their mean over all real pairs: no pair is on its own."""
    count = logps.weights.sum()
    mean = (logps.weights * logps.margin).sum() / count
    x = options.beta * (logps.margin - mean)
    return LossOut(-jax.nn.log_sigmoid(x), {"centre": jnp.full_like(x, mean)})


@pytest.fixture
def whole_batch_loss(monkeypatch):
    monkeypatch.setitem(LOSSES, "hinge", Loss(function=centred, whole_batch=True))


def test_a_whole_batch_loss_is_that_of_the_whole_batch(whole_batch_loss):
    """Whatever the batch is split into: microbatches, data, padding pairs.

    Beside it `sft`, whose mean is over the whole batch's tokens, and sums that are cut
    at the shorter completion.
    """
    pairs = make_pairs(14)  # and two padding pairs
    losses = {"loss_type": ("hinge", "sft"), "loss_weights": (1.0, 0.3)}
    options = {"steps": 1, "pairs": pairs, "ld_alpha": 0.5} | losses
    want = run((1, 1, 1), **options)
    assert_same(run((2, 2, 1, 2), gradient_accumulation_steps=4, **options), want)
    # Pair by pair, each is alone with itself: the margin's mean would be another.
    assert want.lines[0]["centre"] == pytest.approx(
        want.lines[0]["rewards/margins"] / 0.2, rel=1e-5
    )


def test_a_loss_taken_both_ways_is_the_same(monkeypatch):
    """`sigmoid` as a loss of the whole batch gives what it gives pair by pair.

    Each pair weighed by its likelihood, on one device and on four.
    """
    want = run((1, 1, 1), steps=1, use_weighting=True)
    monkeypatch.setitem(
        LOSSES, "ipo", Loss(function=LOSSES["sigmoid"].function, whole_batch=True)
    )
    got = run(
        (2, 2, 1),
        steps=1,
        gradient_accumulation_steps=2,
        loss_type="ipo",
        use_weighting=True,
    )
    assert_same(got, want)


def test_what_is_not_trained_stays_and_has_no_state(monkeypatch):
    """Trainable or not is a column of the table of parameters."""
    table = DecoderConfig.parameters

    def frozen_embedding(config):
        found = table(config)
        path = ("embed",)
        return found | {path: dataclasses.replace(found[path], trainable=False)}

    monkeypatch.setattr(DecoderConfig, "parameters", frozen_embedding)
    config = DPOConfig(total_batch_size=8, learning_rate=1e-2)
    model = model_on((1, 2, 1))
    reference = make_reference(model, model_on((1, 2, 1), seed=1), config)
    optimizer = make_optimizer(config, model.config, model.mesh, 2)
    schedule = learning_rate_schedule(config, 2)
    step = make_train_step(model, reference, optimizer, schedule, step_options(config))
    _, params, frozen = split_model(model)
    before = jax.device_get((params, frozen))
    assert "embed" in frozen and "embed" not in params
    state = init_state(model, optimizer)
    assert all("embed" not in str(path) for path, _ in jax.tree.leaves_with_path(state))
    plan = BatchPlan(
        Order(num_pairs=8, pairs_per_batch=8), Layout(make_pairs(8), 8, 1, 2)
    )
    batch, _ = next(plan.batches())
    numbers = jax.tree.map(jnp.float32, loss_options(config))
    state, out = step(
        state, frozen, reference.operands, put_batch(batch, model.mesh), numbers
    )
    assert out.finite and means(out.sums)["loss"] > 0
    moved = jax.tree.map(
        lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()),
        jax.device_get(state.params),
        before[0],
    )
    assert all(jax.tree.leaves(moved))
    np.testing.assert_array_equal(frozen["embed"][...], before[1]["embed"][...])


def test_gradients_are_added_up_in_float32():
    """Of bfloat16 parameters too, over sixteen microbatches: the same norm."""
    options = {"param_dtype": "bfloat16"}
    norms = [
        run(
            (1, 1, 1),
            steps=1,
            gradient_accumulation_steps=microbatches,
            model_options=options,
            total_batch_size=16,
        ).lines[0]["grad_norm"]
        for microbatches in (1, 16)
    ]
    # Each microbatch's gradient of a bfloat16 parameter is rounded to 2**-9 of itself
    # before it is added; what is left of that in the norm of some 20000 is far less.
    assert norms[1] == pytest.approx(norms[0], rel=2**-9 / 10)


def test_rounding_at_random_is_right_on_average():
    x = jnp.linspace(1.0, 1.1, 2000, dtype=jnp.float32)
    keys = jax.random.split(jax.random.key(0), 200)
    drawn = jax.vmap(lambda key: round_at_random(x, jnp.bfloat16, key))(keys)
    drawn = np.asarray(drawn.astype(jnp.float32), np.float64)
    gap = 2.0**-7  # of bfloat16 from 1 to 2
    assert (np.abs(drawn - np.asarray(x)) < gap).all()
    # 200 draws of one of two neighbours: at most gap/2 of standard deviation each.
    error = np.abs(drawn.mean(axis=0) - np.asarray(x, np.float64))
    assert error.max() < 5 * gap / 2 / np.sqrt(200)
    exact = jnp.array([1.0, -2.0, 0.0, jnp.inf, 3.5], jnp.float32)
    for key in keys[:5]:
        np.testing.assert_array_equal(
            round_at_random(exact, jnp.bfloat16, key), exact.astype(jnp.bfloat16)
        )
    assert jnp.isnan(round_at_random(jnp.array([jnp.nan]), jnp.bfloat16, keys[0]))[0]


def test_small_updates_of_bfloat16_parameters_are_not_lost():
    """Of 1e-4 of their unit in the last place: a cast would leave all as they are."""
    params = {"w": jnp.full((40_000,), 1.0, jnp.bfloat16)}
    update = {"w": jnp.full((40_000,), 2.0**-7 / 100, jnp.float32)}
    keys = jax.random.split(jax.random.key(0), 2)
    moved = add_updates(params, update, keys[0])["w"].astype(jnp.float32)
    assert moved.mean() - 1 == pytest.approx(2.0**-7 / 100, rel=0.2)
    again = add_updates(params, update, keys[0])["w"].astype(jnp.float32)
    other = add_updates(params, update, keys[1])["w"].astype(jnp.float32)
    np.testing.assert_array_equal(moved, again)
    assert (moved != other).any()
