"""Partials of blocks or of devices, folded together into results."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from dpo_kernels.op import accurate
from dpo_kernels.op.interface import Partials, finite_shift


def no_vocabulary(T: int, acc, stats) -> Partials:
    """The partials of a device whose slice of the vocabulary is empty."""
    none, zero = jnp.full((T,), -jnp.inf, acc), jnp.zeros((T,), acc)
    mean = zero if "mean_logit" in stats else None
    return Partials(
        max=none,
        sum_exp=zero,
        target_logit=none,
        sum_exp_diff=zero if "entropy" in stats else None,
        sum_exp2=zero if "collision" in stats else None,
        sum_logit=mean,
        num_logits=mean,
    )


def merge(
    partials: Partials,
    reduce_max: Callable[[Array], Array],
    reduce_sum: Callable[[Array], Array],
) -> Partials:
    """Fold blocks, or devices: the same sums, rescaled to the common maximum.

    With M the common maximum, exp(z - M) = exp(z - m) * exp(m - M), and in the sum for
    the entropy z - M = (z - m) + (m - M). The order of a sum is fixed, so the same
    inputs give the same bits.
    """
    top = reduce_max(partials.max)
    drop = partials.max - finite_shift(top)  # m - M: 0 or less; -inf of an empty block
    factor = accurate.exp(drop)

    def total(x: Array | None, factor=None) -> Array | None:
        if x is None:
            return None
        return reduce_sum(x if factor is None else x * factor)

    exp_diff = partials.sum_exp_diff
    if exp_diff is not None:
        # What the factor makes 0 stays finite: 0 * -inf would be NaN.
        safe_drop = jnp.where(factor > 0, drop, jnp.zeros_like(drop))
        exp_diff = exp_diff + partials.sum_exp * safe_drop
    return Partials(
        max=top,
        sum_exp=reduce_sum(partials.sum_exp * factor),
        target_logit=reduce_max(partials.target_logit),
        sum_exp_diff=total(exp_diff, factor),
        sum_exp2=total(partials.sum_exp2, factor * factor),
        sum_logit=total(partials.sum_logit),
        num_logits=total(partials.num_logits),
    )


def finish(partials: Partials, stats: tuple[str, ...]) -> tuple[Array, ...]:
    """(logprob, lse, *stats) from partials of the whole vocabulary.

    `logprob` and the entropy do not go through `lse`, whose rounding grows with the
    size of the logits: at 1e8 it is a multiple of 8. What they are made of, the
    differences from the maximum and log(sum_exp), is as small as they are.
    """
    top, total, target, exp_diff, exp2, sum_logit, count = partials
    log_total = accurate.log(total)
    # A target that does not exist has probability 0, also where nothing exists.
    impossible = target == -jnp.inf
    logprob = jnp.where(impossible, target, (target - finite_shift(top)) - log_total)
    found = {"top1": target >= top}
    if exp_diff is not None:
        found["entropy"] = log_total - exp_diff / total
    if exp2 is not None:
        found["collision"] = exp2 / total**2
    if sum_logit is not None and count is not None:
        found["mean_logit"] = sum_logit / count
    return (logprob, top + log_total, *(found[name] for name in stats))
