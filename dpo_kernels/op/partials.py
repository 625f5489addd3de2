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
        sum_exp_z=zero if "entropy" in stats else None,
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

    The order of a sum is fixed, so the same inputs give the same bits.
    """
    top = reduce_max(partials.max)
    factor = accurate.exp(partials.max - finite_shift(top))

    def total(x: Array | None, factor=None) -> Array | None:
        if x is None:
            return None
        return reduce_sum(x if factor is None else x * factor)

    return Partials(
        max=top,
        sum_exp=reduce_sum(partials.sum_exp * factor),
        target_logit=reduce_max(partials.target_logit),
        sum_exp_z=total(partials.sum_exp_z, factor),
        sum_exp2=total(partials.sum_exp2, factor * factor),
        sum_logit=total(partials.sum_logit),
        num_logits=total(partials.num_logits),
    )


def finish(partials: Partials, stats: tuple[str, ...]) -> tuple[Array, ...]:
    """(logprob, lse, *stats) from partials of the whole vocabulary."""
    top, total, target, exp_z, exp2, sum_logit, count = partials
    lse = top + accurate.log(total)
    found = {"top1": target >= top}
    if exp_z is not None:
        found["entropy"] = lse - exp_z / total
    if exp2 is not None:
        found["collision"] = exp2 / total**2
    if sum_logit is not None and count is not None:
        found["mean_logit"] = sum_logit / count
    return (target - lse, lse, *(found[name] for name in stats))
