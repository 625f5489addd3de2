"""Losses that compare pairs with each other: they are given all of a batch.

In the notation of `pair_losses`. Padding pairs weigh 0 and change nothing; a pair of
weight 2 counts as two.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from engine.objective.interface import LossOptions, LossOut, PairLogps
from engine.objective.pair_losses import logistic


def aot(logps: PairLogps, options: LossOptions) -> LossOut:
    """`sigmoid` of beta (sort(pc - pr) - sort(rc - rr)): quantile against quantile.

    Source: Melnyk et al. 2024, arXiv:2406.05882, the paired form.
    """
    policy = logps.chosen - logps.rejected
    reference = logps.ref_chosen - logps.ref_rejected
    return LossOut(_by_quantile(policy, reference, logps.weights, options))


def aot_unpaired(logps: PairLogps, options: LossOptions) -> LossOut:
    """`sigmoid` of beta (sort(c) - sort(r)): chosen and rejected need not be pairs.

    Source: Melnyk et al. 2024, arXiv:2406.05882, the unpaired form.
    """
    chosen, rejected = logps.chosen_ratio, logps.rejected_ratio
    return LossOut(_by_quantile(chosen, rejected, logps.weights, options))


def _by_quantile(
    x: Float[Array, " B"],
    y: Float[Array, " B"],
    weights: Float[Array, " B"],
    options: LossOptions,
) -> Float[Array, " B"]:
    """The mean over q in [0, 1] of loss(quantile_q of x - quantile_q of y).

    Both are of the distribution that `weights` make. With equal weights this pairs the
    sorted values; in general the quantiles step at 2B places. What is of x's i-th value
    goes into the i-th result, divided by its weight.
    """
    x_order, y_order = jnp.argsort(x), jnp.argsort(y)
    x_ends, y_ends = jnp.cumsum(weights[x_order]), jnp.cumsum(weights[y_order])
    ends = jnp.sort(jnp.concatenate([x_ends, y_ends]))
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    # Which value's step the middle of a piece lies in: pieces of no length may choose
    # any.
    middle = (starts + ends) / 2
    last = x.shape[0] - 1

    def owner(steps: Array, order: Array) -> Array:
        step = jnp.searchsorted(steps, middle, side="right")
        return order[jnp.minimum(step, last)]

    own, other = owner(x_ends, x_order), owner(y_ends, y_order)
    loss = logistic(options.beta * (x[own] - y[other]), options.label_smoothing)
    share = jnp.where(weights[own] > 0, (ends - starts) / weights[own], 0.0)
    return jnp.zeros_like(x).at[own].add(share * loss)


def bco_pair_shifted(logps: PairLogps, options: LossOptions) -> LossOut:
    """-S(beta c - d) - S(-(beta r - d)), d = the mean of all beta c and beta r.

    Source: Jung et al. 2024, arXiv:2404.04656; d is of the batch, and differentiated,
    as in EasyDeL.
    """
    chosen = options.beta * logps.chosen_ratio
    rejected = options.beta * logps.rejected_ratio
    shift = logps.pair_mean((chosen + rejected) / 2)
    log_sigmoid = jax.nn.log_sigmoid
    return LossOut(-log_sigmoid(chosen - shift) - log_sigmoid(-(rejected - shift)))


def kto_pair(logps: PairLogps, options: LossOptions) -> LossOut:
    """(sig(-beta (c - zr)) + sig(-beta (zc - r))) / 2: a pair as two examples.

    zc = max(0, mean of c) and zr = max(0, mean of r) estimate the KL divergence, each
    for the other side, and are not differentiated.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7 and 8, in the form for pairs
    of TRL 0.8.
    """

    def divergence(ratio: Float[Array, " B"]) -> Float[Array, ""]:
        return jax.lax.stop_gradient(jax.nn.relu(logps.pair_mean(ratio)))

    chosen, rejected = logps.chosen_ratio, logps.rejected_ratio
    better = jax.nn.sigmoid(-options.beta * (chosen - divergence(rejected)))
    worse = jax.nn.sigmoid(-options.beta * (divergence(chosen) - rejected))
    return LossOut((better + worse) / 2)
