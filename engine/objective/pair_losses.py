"""Losses that take each pair for itself: pure functions of log-probabilities.

Notation of the formulas: pc, pr are the policy's and rc, rr the reference's summed
log-probabilities of chosen and rejected; c = pc - rc, r = pr - rr; |c|, |r| are the
numbers of scored tokens; s is the score of `divergences` (the identity for reverse KL)
and S log sigmoid; eps is label_smoothing. docs/losses.md has all of them in one table.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from engine.objective.interface import LossOptions, LossOut, PairLogps

# What a squared term is cut off at: its square is still a number of float32.
_MOST_SQUARED = 1e18
# A mean log-probability above minus this counts as this: log(1 - exp(0)) is infinite.
_LEAST_NATS = 1e-7


def logistic(x: Float[Array, " B"], eps: object) -> Float[Array, " B"]:
    """-(1 - eps) S(x) - eps S(-x): the label is wrong with probability eps."""
    log_sigmoid = jax.nn.log_sigmoid
    return -(1 - eps) * log_sigmoid(x) - eps * log_sigmoid(-x)  # pyright: ignore[reportOperatorIssue]


def _squared(x: Float[Array, " B"]) -> Float[Array, " B"]:
    return jnp.clip(x, -_MOST_SQUARED, _MOST_SQUARED) ** 2


def _means(
    logps: PairLogps, chosen: Float[Array, " B"], rejected: Float[Array, " B"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Sums as means over tokens. An empty completion's sum is 0, and so is its mean."""
    return (
        chosen / jnp.maximum(logps.chosen_length, 1),
        rejected / jnp.maximum(logps.rejected_length, 1),
    )


def sigmoid(logps: PairLogps, options: LossOptions) -> LossOut:
    """-(1 - eps) S(x) - eps S(-x), x = beta (s(c) - s(r)).

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; with eps, the conservative
    form of Mitchell 2023 (a note on DPO with noisy preferences).
    """
    x = options.beta * options.score_margin(logps)
    return LossOut(logistic(x, options.label_smoothing))


def sigmoid_norm(logps: PairLogps, options: LossOptions) -> LossOut:
    """`sigmoid` of x = beta (s(c) / |c| - s(r) / |r|): no gain from length.

    Source: Lambert et al. 2024, arXiv:2411.15124 (Tulu 3), length-normalised DPO.
    """
    chosen, rejected = _means(logps, *options.scores(logps))
    return LossOut(
        logistic(options.beta * (chosen - rejected), options.label_smoothing)
    )


def hinge(logps: PairLogps, options: LossOptions) -> LossOut:
    """max(0, 1 - beta (s(c) - s(r))).

    Source: Liu et al. 2023, arXiv:2309.06657 (RSO), the normalised SLiC loss.
    """
    return LossOut(jax.nn.relu(1 - options.beta * options.score_margin(logps)))


def ipo(logps: PairLogps, options: LossOptions) -> LossOut:
    """(s(c) / |c| - s(r) / |r| - 1 / (2 beta)) squared, on means over tokens.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17; the means over tokens are the
    form that its authors use.
    """
    chosen, rejected = _means(logps, *options.scores(logps))
    return LossOut(_squared(chosen - rejected - 1 / (2 * options.beta)))


def exo_pair(logps: PairLogps, options: LossOptions) -> LossOut:
    """sig(x) (S(x) - log(1 - eps)) + sig(-x) (S(-x) - log eps).

    With x = beta (s(c) - s(r)): the KL divergence of the policy's preference from the
    label's (1 - eps, eps), which is infinite for eps = 0.

    Source: Ji et al. 2024, arXiv:2402.00856, eq. 16 for two completions.
    """
    x, eps = options.beta * options.score_margin(logps), options.label_smoothing
    right = jax.nn.sigmoid(x) * (jax.nn.log_sigmoid(x) - jnp.log1p(-eps))
    wrong = jax.nn.sigmoid(-x) * (jax.nn.log_sigmoid(-x) - jnp.log(eps))
    return LossOut(right + wrong)


def nca_pair(logps: PairLogps, options: LossOptions) -> LossOut:
    """-S(beta c) - S(-beta c) / 2 - S(-beta r) / 2.

    Source: Chen et al. 2024, arXiv:2402.05369, for two completions.
    """
    chosen = options.beta * logps.chosen_ratio
    rejected = options.beta * logps.rejected_ratio
    log_sigmoid = jax.nn.log_sigmoid
    both = log_sigmoid(-chosen) + log_sigmoid(-rejected)
    return LossOut(-log_sigmoid(chosen) - 0.5 * both)


def robust(logps: PairLogps, options: LossOptions) -> LossOut:
    """(-(1 - eps) S(x) + eps S(-x)) / (1 - 2 eps), x = beta (s(c) - s(r)).

    Its mean over labels of which a share eps is wrong is the loss of the right ones; it
    may be negative.

    Source: Chowdhury et al. 2024, arXiv:2403.00409, eq. 12.
    """
    x, eps = options.beta * options.score_margin(logps), options.label_smoothing
    right, wrong = jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x)
    return LossOut((-(1 - eps) * right + eps * wrong) / (1 - 2 * eps))


def bco_pair(logps: PairLogps, options: LossOptions) -> LossOut:
    """-S(beta c) - S(-beta r).

    Source: Jung et al. 2024, arXiv:2404.04656, without its shift of the rewards, which
    `bco_shift: batch_mean` adds.
    """
    chosen = options.beta * logps.chosen_ratio
    rejected = options.beta * logps.rejected_ratio
    return LossOut(-jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected))


def sppo_hard(logps: PairLogps, options: LossOptions) -> LossOut:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2.

    Source: Wu et al. 2024, arXiv:2405.00675, eq. 4.7 with the probabilities 1 and 0.
    """
    target = 0.5 / options.beta
    return LossOut(
        _squared(logps.chosen_ratio - target) + _squared(logps.rejected_ratio + target)
    )


def apo_zero(logps: PairLogps, options: LossOptions) -> LossOut:
    """1 - sig(beta c) + sig(beta r): for answers better than the model's own.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7.
    """
    chosen = jax.nn.sigmoid(-options.beta * logps.chosen_ratio)
    return LossOut(chosen + jax.nn.sigmoid(options.beta * logps.rejected_ratio))


def apo_down(logps: PairLogps, options: LossOptions) -> LossOut:
    """sig(beta c) + 1 - sig(beta (c - r)): for answers worse than the model's own.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8.
    """
    chosen = jax.nn.sigmoid(options.beta * logps.chosen_ratio)
    return LossOut(chosen + jax.nn.sigmoid(-options.beta * logps.margin))


def discopop(logps: PairLogps, options: LossOptions) -> LossOut:
    """-(1 - m) S(x) + m exp(-x), x = beta (s(c) - s(r)), m = sig(x / tau).

    Source: Lu et al. 2024, arXiv:2406.08414, eq. 5, the log-ratio modulated loss.
    """
    x = options.beta * options.score_margin(logps)
    log_m = jax.nn.log_sigmoid(x / options.discopop_tau)
    logistic_part = -jax.nn.sigmoid(-x / options.discopop_tau) * jax.nn.log_sigmoid(x)
    # In one exponent: m is 0 long before exp(-x) is infinite.
    return LossOut(logistic_part + jnp.exp(log_m - x))


def dpop(logps: PairLogps, options: LossOptions) -> LossOut:
    """`sigmoid` of x = beta (c - r - lambda max(0, -c)).

    The chosen's log-probability must not fall below the reference's.

    Source: Pal et al. 2024, arXiv:2402.13228 (DPO-Positive), eq. 3.
    """
    fallen = jax.nn.relu(-logps.chosen_ratio)
    x = options.beta * (logps.margin - options.dpop_lambda * fallen)
    return LossOut(logistic(x, options.label_smoothing))


def sft(logps: PairLogps, options: LossOptions) -> LossOut:
    """Minus the mean of log-probability over the chosen tokens of the whole batch.

    A pair's share is its sum over the batch's mean length, so that the mean over pairs
    is the mean over tokens, whatever the batch is split into.
    """
    del options
    return LossOut(-logps.whole_chosen / logps.mean_chosen_length)


def cpo(logps: PairLogps, options: LossOptions) -> LossOut:
    """`sigmoid` of x = beta (pc - pr), plus cpo_alpha times `sft`; no reference.

    Source: Xu et al. 2024, arXiv:2401.08417, eq. 5 and 6.
    """
    x = options.beta * (logps.chosen - logps.rejected)
    preference = logistic(x, options.label_smoothing)
    return LossOut(preference + options.cpo_alpha * sft(logps, options).per_pair)


def simpo(logps: PairLogps, options: LossOptions) -> LossOut:
    """`sigmoid` of x = beta (pc / |c| - pr / |r|) - gamma; no reference.

    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    chosen, rejected = _means(logps, logps.chosen, logps.rejected)
    x = options.beta * (chosen - rejected) - options.simpo_gamma
    rewards = options.beta * chosen, options.beta * rejected
    return LossOut(logistic(x, options.label_smoothing), rewards=rewards)


def orpo(logps: PairLogps, options: LossOptions) -> LossOut:
    """-lc - beta S(o(lc) - o(lr)), o(l) = l - log(1 - exp(l)); no reference.

    lc = pc / |c| and lr = pr / |r| are means over tokens, and o is the log of the odds.

    Source: Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7; its lambda is beta here.
    """
    chosen, rejected = _means(logps, logps.chosen, logps.rejected)
    odds = jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))
    rewards = options.beta * chosen, options.beta * rejected
    return LossOut(-chosen - options.beta * odds, rewards=rewards)


def _log_odds(mean: Float[Array, " B"]) -> Float[Array, " B"]:
    mean = jnp.minimum(mean, -_LEAST_NATS)
    # log(1 - exp(x)), each form where it has digits; the other one is kept finite.
    large = mean < -0.6931472
    far = jnp.log1p(-jnp.exp(jnp.where(large, mean, -1.0)))
    near = jnp.log(-jnp.expm1(jnp.where(large, -1.0, mean)))
    return mean - jnp.where(large, far, near)
