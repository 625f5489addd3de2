"""The gradient of logits on a TPU, from a product that is still on the chip."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dpo_kernels.backends.pallas_tpu_forward import LANES
from dpo_kernels.interface import LogitOptions

f32 = jnp.float32


def pack_rows(lse: Array, p_coef: Array, target_grad: Array, targets: Array) -> Array:
    """What the gradient of a row's logits needs, in the first lanes: [T, 128]."""
    bits = lax.bitcast_convert_type(targets, f32)
    columns = jnp.stack([lse, p_coef, target_grad, bits], axis=1)
    return jnp.pad(columns, ((0, 0), (0, LANES - columns.shape[1])))


def dlogits_of(
    raw_tv: Float[Array, "t v"],
    bias_v: Any,
    rows_t: Float[Array, "t 128"],
    first_v: Any,
    options: LogitOptions,
) -> Float[Array, "t v"]:
    """The gradient of x = scale * raw + bias in float32: `Dlogits`.

    `rows_t` is of `pack_rows`; `first_v` is its targets' number of the first column.
    """
    lse, p_coef, target_grad, bits = (rows_t[:, n : n + 1] for n in range(4))
    target = lax.bitcast_convert_type(bits, jnp.int32) - first_v
    x_tv = raw_tv if options.scale == 1 else options.scale * raw_tv
    masked_v = None
    if bias_v is not None:
        masked_v = bias_v == -jnp.inf
        x_tv = x_tv + jnp.where(masked_v, 0.0, bias_v)
    slope_tv, z_tv = None, x_tv
    if options.softcap is not None:
        tanh_tv = jnp.tanh(x_tv / options.softcap)
        slope_tv, z_tv = 1 - tanh_tv * tanh_tv, options.softcap * tanh_tv
    column = lax.broadcasted_iota(jnp.int32, x_tv.shape, 1)
    dx_tv = jnp.where(column == target, target_grad, p_coef * jnp.exp(z_tv - lse))
    if slope_tv is not None:
        dx_tv = dx_tv * slope_tv
    return dx_tv if masked_v is None else jnp.where(masked_v, 0.0, dx_tv)
