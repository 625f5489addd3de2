"""Each loss against its formula in scalar Python, and in known places."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.objective.losses import LOSSES, LossOptions, PairLogps

RNG = np.random.default_rng(0)
BETA = 0.3


def pairs(n: int = 6) -> PairLogps:
    logps = -5 * RNG.random((4, n)) - 1
    lengths = RNG.integers(1, 9, (2, n))
    every = (*logps, *lengths, np.ones(n))
    return PairLogps(*(jnp.asarray(x, jnp.float32) for x in every))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def formula(name: str, eps: float, pc, pr, rc, rr, lc, lr, weight) -> float:
    margin = (pc - rc) - (pr - rr)
    if name == "sigmoid":
        x = BETA * margin
        return -(1 - eps) * log_sigmoid(x) - eps * log_sigmoid(-x)
    if name == "hinge":
        return max(0.0, 1 - BETA * margin)
    assert name == "ipo"
    return ((pc - rc) / lc - (pr - rr) / lr - 1 / (2 * BETA)) ** 2


@pytest.mark.parametrize(
    "name, eps", [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0)]
)
def test_values(name, eps):
    logps = pairs()
    options = LossOptions(beta=BETA, label_smoothing=eps)
    got = LOSSES[name].function(logps, options).per_pair
    want = [formula(name, eps, *map(float, row)) for row in zip(*logps, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_equal_policy_and_reference_give_the_known_value_and_the_right_direction(name):
    zeros = jnp.zeros(3)
    ones = jnp.ones(3)
    options = LossOptions(beta=BETA)

    def loss(chosen, rejected):
        logps = PairLogps(chosen, rejected, zeros, zeros, ones, ones, ones)
        return LOSSES[name].function(logps, options).per_pair.sum()

    known = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * BETA**2)}[name]
    np.testing.assert_allclose(loss(zeros, zeros), 3 * known, rtol=1e-6)
    dchosen, drejected = jax.grad(loss, (0, 1))(zeros, zeros)
    assert (dchosen < 0).all() and (drejected > 0).all()


def test_ipo_of_an_empty_completion_is_finite():
    zeros = jnp.zeros(2)
    logps = PairLogps(zeros, zeros, zeros, zeros, zeros, jnp.ones(2), jnp.ones(2))
    out = LOSSES["ipo"].function(logps, LossOptions(beta=BETA))
    assert jnp.isfinite(out.per_pair).all()


def test_large_margins_neither_overflow_nor_vanish():
    big = jnp.full(2, 1e4)
    zeros, ones = jnp.zeros(2), jnp.ones(2)
    options = LossOptions(beta=1.0, label_smoothing=0.1)

    def loss(chosen):
        logps = PairLogps(chosen, zeros, zeros, zeros, ones, ones, ones)
        return LOSSES["sigmoid"].function(logps, options).per_pair.sum()

    for chosen in (big, -big):
        value, gradient = jax.value_and_grad(loss)(chosen)
        assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
