"""Each loss against its paper's formula in float64: values and gradients."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.objective.batch_losses import kto_pair
from engine.objective.divergences import score
from engine.objective.interface import Divergence, LossOptions, PairLogps
from engine.objective.losses import BCO_SHIFTED, LOSSES, Loss, total_loss
from tests.engine.objective.loss_formulas import Numbers, pair_loss
from tests.engine.objective.loss_formulas import score as score64

pytestmark = pytest.mark.numerics

ALL = LOSSES | {"bco_pair_shifted": BCO_SHIFTED}
NUMBERS = Numbers(beta=0.3, eps=0.1, tau=0.4, lam=5.0, gamma=0.7, alpha=0.6, power=0.4)
# Policy minus reference, in nats, of chosen and rejected: none, a little, far apart.
MARGINS = {
    "equal": np.zeros((2, 5)),
    "moderate": np.array([[2.0, -3.0, 0.5, 6.0, -1.0], [-4.0, 1.5, 0.25, -2.0, 5.0]]),
    "far": np.array([[100.0, -100, 200, -200, 0], [-100.0, 100, 0, 3, -200]]),
}


def logps_of(margins: np.ndarray, weights: np.ndarray | None = None) -> PairLogps:
    """Pairs whose policy is `margins` above their reference; all below zero."""
    n = margins.shape[1]
    rng = np.random.default_rng(1)
    reference = -210 - 40 * rng.random((2, n))
    policy = reference + margins
    lengths = rng.integers(3, 90, (2, n)).astype(float)
    weights = np.ones(n) if weights is None else weights
    mean = np.full(n, (weights * lengths[0]).sum() / weights.sum())
    every = (*policy, *reference, *lengths, weights, policy[0], mean, np.ones(n))
    return PairLogps(*(jnp.asarray(x, jnp.float32) for x in every))


def options_of(n: Numbers, **changes) -> LossOptions:
    options = LossOptions(
        beta=n.beta,
        label_smoothing=n.eps,
        discopop_tau=n.tau,
        dpop_lambda=n.lam,
        simpo_gamma=n.gamma,
        cpo_alpha=n.alpha,
        f_divergence_type=n.divergence,
        f_alpha_divergence_coef=n.power,
    )
    return dataclasses.replace(options, **changes)


def truth(name: str, logps: PairLogps, n: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """The mean loss's values and its gradient by the policy's two sums, in float64."""
    x = [np.asarray(v, np.float64) for v in logps[:6]]

    def each(chosen, rejected):
        return pair_loss(name, chosen, rejected, x[2], x[3], x[4], x[5], n)

    values = each(x[0], x[1])
    gradient = np.zeros((2, len(x[0])))
    step = 1e-5
    if name == "kto_pair":  # its estimates of a divergence are constants
        return values, gradient
    for side in range(2):
        for i in range(len(x[0])):
            up, down = ([a.copy() for a in x[:2]] for _ in range(2))
            up[side][i] += step
            down[side][i] -= step
            gradient[side, i] = (each(*up) - each(*down)).mean() / (2 * step)
    return values, gradient


def ours(loss: Loss, logps: PairLogps, options: LossOptions):
    def mean(chosen, rejected):
        given = logps._replace(chosen=chosen, rejected=rejected, whole_chosen=chosen)
        out = loss.function(given, options)
        return given.pair_mean(out.per_pair), out.per_pair

    (_, values), gradient = jax.value_and_grad(mean, (0, 1), has_aux=True)(
        logps.chosen, logps.rejected
    )
    return np.asarray(values), np.asarray(gradient)


def assert_formula(name: str, logps: PairLogps, n: Numbers, scale: float):
    """`scale`: of the numbers that are subtracted, whose rounding is the error's."""
    values, gradient = ours(ALL[name], logps, options_of(n))
    wanted, slope = truth(name, logps, n)
    # float32 sums near 250 nats are off by 250 * 2**-24, times the loss's slope.
    rounding = 8 * 250 * 2.0**-24 * scale
    if ALL[name].whole_batch and name.startswith("aot"):
        values, wanted = np.sort(values), np.sort(wanted)
    np.testing.assert_allclose(values, wanted, rtol=2e-5, atol=rounding)
    # dpop has a kink where the chosen is as likely as under the reference.
    kink = name == "dpop" and (logps.chosen_ratio == 0).any()
    if name != "kto_pair" and not kink:
        np.testing.assert_allclose(gradient, slope, rtol=1e-3, atol=rounding)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("margins", MARGINS)
def test_values_and_gradients_are_the_formula_s(name, margins):
    n = NUMBERS
    if name == "discopop" and margins == "far":
        n = dataclasses.replace(n, beta=0.05)
    logps = logps_of(MARGINS[margins])
    squared = 2 * 210 if name == "sppo_hard" else 1
    assert_formula(name, logps, n, scale=max(squared, n.lam if name == "dpop" else 1))


@pytest.mark.parametrize(
    "name", [name for name, row in LOSSES.items() if row.divergence]
)
@pytest.mark.parametrize("kind", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_divergences(name, kind):
    n = dataclasses.replace(NUMBERS, divergence=kind)
    for margins in ("equal", "moderate"):
        # exp of 6 nats stands before the rounding of the sums, and is squared by ipo.
        assert_formula(name, logps_of(MARGINS[margins] / 2), n, scale=20)


def test_alpha_divergence_has_its_limits():
    u = jnp.linspace(-2, 2, 9)
    np.testing.assert_array_equal(score(u, "alpha_divergence", 1.0), u)
    forward = score(u, "forward_kl", None)
    np.testing.assert_allclose(score(u, "alpha_divergence", 0.0), forward, rtol=1e-6)
    near = score64(np.asarray(u), Numbers(divergence="alpha_divergence", power=0.5))
    np.testing.assert_allclose(score(u, "alpha_divergence", 0.5), near, rtol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_everything_is_finite_far_away(name):
    kinds: tuple[Divergence, ...] = ("reverse_kl",)
    if ALL[name].divergence:
        kinds += ("forward_kl", "js_divergence", "alpha_divergence")
    for kind in kinds:
        for beta in (0.1, 1.0):
            options = LossOptions(
                beta=beta, label_smoothing=0.1, f_divergence_type=kind
            )
            found = ours(ALL[name], logps_of(MARGINS["far"]), options)
            assert all(np.isfinite(x).all() for x in found), kind


@pytest.mark.parametrize("name", LOSSES)
def test_what_prefers_the_chosen_is_better(name):
    """At equal log-probabilities every loss falls with the chosen's likelihood."""
    if name == "apo_down":
        pytest.skip("it lowers both, the rejected more")
    _, (dchosen, drejected) = ours(
        LOSSES[name],
        logps_of(MARGINS["equal"]),
        options_of(NUMBERS, label_smoothing=1e-6),
    )
    assert (dchosen < 0).all()
    assert (drejected >= 0).all()
    assert (drejected > 0).all() == (name != "sft")


def test_empty_completions_are_finite():
    logps = logps_of(MARGINS["equal"])
    zeros, ones = jnp.zeros(5), jnp.ones(5)
    empty = PairLogps(*logps)._replace(
        **dict.fromkeys(PairLogps._fields[:6], zeros),
        whole_chosen=zeros,
        mean_chosen_length=ones,
    )
    for name, loss in ALL.items():
        for given in (empty, logps._replace(rejected=zeros, rejected_length=zeros)):
            found = ours(loss, given, options_of(NUMBERS))
            assert all(np.isfinite(x).all() for x in found), name


@pytest.mark.parametrize("name", ALL)
def test_a_padding_pair_changes_nothing_and_a_weight_of_two_counts_twice(name):
    margins = MARGINS["moderate"]
    twice = logps_of(margins[:, [0, 1, 1, 2, 3]])
    weights = np.array([1.0, 2.0, 1.0, 1.0, 0.0])
    once = PairLogps(*(jnp.asarray(x)[jnp.array([0, 1, 3, 4, 0])] for x in twice))
    # The second of the doubled pair is made equal to the first.
    twice = PairLogps(*(jnp.asarray(x)[jnp.array([0, 1, 1, 3, 4])] for x in twice))
    mean = (twice.weights * twice.chosen_length).mean()
    twice = twice._replace(mean_chosen_length=jnp.full(5, mean))
    once = once._replace(
        weights=jnp.asarray(weights, jnp.float32), mean_chosen_length=jnp.full(5, mean)
    )
    options = options_of(NUMBERS)
    function = ALL[name].function
    want = twice.pair_mean(function(twice, options).per_pair)
    got = once.pair_mean(function(once, options).per_pair)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    _, gradient = ours(ALL[name], once, options)
    assert (gradient[:, 4] == 0).all()


def test_kto_pair_s_divergences_are_constants():
    """Shifting one pair moves the others' losses, but gives them no gradient."""
    logps, options = logps_of(MARGINS["moderate"]), options_of(NUMBERS)

    def first(chosen):
        return kto_pair(logps._replace(chosen=chosen), options).per_pair[0]

    gradient = jax.grad(first)(logps.chosen)
    c, r = (
        np.asarray(x, np.float64) for x in (logps.chosen_ratio, logps.rejected_ratio)
    )
    p = 1 / (1 + math.exp(NUMBERS.beta * (c[0] - max(0, r.mean()))))
    wanted = -NUMBERS.beta * p * (1 - p) / 2
    np.testing.assert_allclose(gradient, [wanted, 0, 0, 0, 0], rtol=1e-4, atol=1e-9)


def test_a_sum_of_losses():
    logps = logps_of(MARGINS["moderate"])
    rows = {name: LOSSES[name] for name in ("sigmoid", "bco_pair", "sft")}
    options = options_of(NUMBERS, loss_weights=(0.8, 0.2, 1.5))
    out = total_loss(rows).function(logps, options)
    parts = [row.function(logps, options).per_pair for row in rows.values()]
    np.testing.assert_allclose(
        out.per_pair, 0.8 * parts[0] + 0.2 * parts[1] + 1.5 * parts[2], rtol=1e-6
    )
    assert set(out.metrics) == {"loss/sigmoid", "loss/bco_pair", "loss/sft"}
    np.testing.assert_array_equal(out.metrics["loss/bco_pair"], parts[1])
    assert not total_loss(rows).whole_batch
    assert total_loss(rows | {"aot": LOSSES["aot"]}).whole_batch


def test_the_likelihood_weighs_each_pair():
    likelihood = jnp.array([0.5, 1.0, 2.0, 0.1, 0.0])
    logps = logps_of(MARGINS["moderate"])._replace(likelihood=likelihood)
    options = options_of(NUMBERS)
    row = LOSSES["sigmoid"]
    out = total_loss({"sigmoid": row}, weighting=True).function(logps, options)
    plain = row.function(logps, options).per_pair
    np.testing.assert_allclose(out.per_pair, plain * likelihood, rtol=1e-6)
