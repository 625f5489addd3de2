"""The gradient of logits whose exponentials the forward has kept."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dpo_kernels.op.interface import Kept, LogitOptions, kept_scale
from dpo_kernels.op.loops import take_rows


class KeptRows(NamedTuple):
    """The kept exponentials and what the gradient of a logit needs of its row."""

    kept: Kept
    factors: Float[Array, "T blocks"]  # times the exponential: off the target
    target_grad: Float[Array, " T"]  # with cap' of the target's logit


def kept_rows(
    kept: Kept,
    target_z: Float[Array, " T"],
    lse: Float[Array, " T"],
    p_coef: Float[Array, " T"],
    target_grad: Float[Array, " T"],
    options: LogitOptions,
) -> KeptRows:
    """Of the coefficients that `Dlogits` gets, and the target's own logit."""
    # No block's maximum is above lse. The 0 in place of an empty block's may be.
    p_of_max = jnp.exp(jnp.minimum(kept.shift - lse[None], 0))
    if options.softcap is not None:
        target_grad = target_grad * (1 - (target_z / options.softcap) ** 2)
    return KeptRows(
        kept=kept,
        factors=(p_of_max * (p_coef / kept_scale(kept.exp.dtype))[None]).T,
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
