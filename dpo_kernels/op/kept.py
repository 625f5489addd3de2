"""The gradient of logits whose exponentials the forward has kept."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dpo_kernels.op.interface import Kept, LogitOptions, kept_scale
from dpo_kernels.op.loops import take_rows


class KeptRows(NamedTuple):
    """The kept exponentials, and what turns them into the gradient of logits."""

    kept: Kept
    # Of every entry but the target: gradient = factor of its block * kept exponential.
    factors: Float[Array, "T blocks"]
    target_grad: Float[Array, " T"]  # at the target, the soft-cap's slope included


def kept_rows(
    kept: Kept,
    target_z: Float[Array, " T"],
    shift: Float[Array, " T"],
    p_coef: Float[Array, " T"],
    target_grad: Float[Array, " T"],
    options: LogitOptions,
) -> KeptRows:
    """From `RowCoefficients`, and the logit `target_z` of each row's target."""
    # exp(block's maximum - row's maximum), which is at most 1. The 0 that stands in for
    # the maximum of an empty block may be above the row's: then there is nothing kept.
    rescale = jnp.exp(jnp.minimum(kept.shift - shift[None], 0))
    if options.softcap is not None:
        target_grad = target_grad * (1 - (target_z / options.softcap) ** 2)
    return KeptRows(
        kept=kept,
        factors=(rescale * (p_coef / kept_scale(kept.exp.dtype))[None]).T,
        target_grad=jnp.where(jnp.isfinite(target_z), target_grad, 0),
    )


def kept_dlogits(
    rows: KeptRows,
    targets: Int[Array, " t"],
    fresh: Bool[Array, " t"],
    start_t: Any,
    start_v: Any,
    chunk: int,
) -> Float[Array, "t chunk"]:
    """As `Dlogits`, of rows and vocabulary entries that were kept.

    `targets` are relative to `start_v`; rows that are not `fresh` give 0.
    """
    length, kept = targets.shape[0], rows.kept
    exp_tv = take_rows(kept.exp, start_t, length)
    exp_tv = lax.dynamic_slice_in_dim(exp_tv, start_v, chunk, axis=1)
    factors_t = take_rows(rows.factors, start_t, length)
    block_v = (start_v + jnp.arange(chunk, dtype=jnp.int32)) // kept.block_v
    factors_tv = factors_t.at[:, block_v].get(mode="clip")
    hit_tv = jnp.arange(chunk, dtype=jnp.int32)[None] == targets[:, None]
    target_grad_t = take_rows(rows.target_grad, start_t, length)
    dx_tv = jnp.where(
        hit_tv, target_grad_t[:, None], factors_tv * exp_tv.astype(factors_tv.dtype)
    )
    # A padding row may hold NaN, which a factor of 0 does not take away.
    dx_tv = jnp.where(fresh[:, None], dx_tv, 0)
    return dx_tv.astype(kept.exp.dtype)
