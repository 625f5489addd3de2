"""The gradient of a tile of logits on a TPU, and a kernel that computes only that.

The kernel is for gradients that `pallas_tpu_backward` is not made for: the shared
backward multiplies its results by XLA's matmuls.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from dpo_kernels.backends.pallas_tpu_forward import LANES, bias_row
from dpo_kernels.interface import LogitOptions
from dpo_kernels.loops import result_like
from dpo_kernels.tpu_tiling import TpuDlogitsTile

f32 = jnp.float32


def pack_rows(lse: Array, p_coef: Array, target_grad: Array, targets: Array) -> Array:
    """What the gradient of a row's logits needs, in the first lanes: [T, 128]."""
    bits = lax.bitcast_convert_type(targets, f32)
    columns = jnp.stack([lse, p_coef, target_grad, bits], axis=1)
    return jnp.pad(columns, ((0, 0), (0, LANES - columns.shape[1])))


def matmul(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Summed in float32 over the two axes of `contract`."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=f32)


def dlogits_tile(
    hidden_t: Array, head: Any, bias: Any, rows_t: Array, first_v: Any, options: Any
) -> Float[Array, "t v"]:
    """The gradient of x = scale * hidden @ head.T + bias in float32: `Backend.dlogits`.

    `rows_t` is of `pack_rows`, its targets relative to entry 0 when `first_v` is that
    of the block.
    """
    lse, p_coef, target_grad, bits = (rows_t[:, n : n + 1] for n in range(4))
    target = lax.bitcast_convert_type(bits, jnp.int32) - first_v
    x_tv = matmul(hidden_t, head[...], (1, 1))
    if options.scale != 1:
        x_tv = options.scale * x_tv
    masked_v = None
    if bias is not None:
        masked_v = bias[...] == -jnp.inf
        x_tv = x_tv + jnp.where(masked_v, 0.0, bias[...])
    slope_tv, z_tv = None, x_tv
    if options.softcap is not None:
        tanh_tv = jnp.tanh(x_tv / options.softcap)
        slope_tv, z_tv = 1 - tanh_tv * tanh_tv, options.softcap * tanh_tv
    column = lax.broadcasted_iota(jnp.int32, x_tv.shape, 1)
    dx_tv = jnp.where(column == target, target_grad, p_coef * jnp.exp(z_tv - lse))
    if slope_tv is not None:
        dx_tv = dx_tv * slope_tv
    return dx_tv if masked_v is None else jnp.where(masked_v, 0.0, dx_tv)


@jax.enable_x64(False)  # indices are int32
def dlogits(
    hidden: Float[Array, "T D"],
    head: Float[Array, "chunk D"],
    bias: Float[Array, " chunk"] | None,
    rows: Float[Array, "T 128"],
    *,
    options: LogitOptions,
    want_dbias: bool,
    tile: TpuDlogitsTile,
) -> tuple[Float[Array, "T chunk"], Float[Array, "blocks chunk"] | None]:
    """`Backend.dlogits`, and sums over each block of rows."""
    (T, D), V = hidden.shape, head.shape[0]
    block_t, block_v = tile.block_t, tile.block_v
    blocks_t, blocks_v = pl.cdiv(T, block_t), pl.cdiv(V, block_v)
    in_specs = [
        pl.BlockSpec((block_t, D), lambda i, _: (i, 0)),
        pl.BlockSpec((block_v, D), lambda _, j: (j, 0)),
        pl.BlockSpec((block_t, LANES), lambda i, _: (i, 0)),
    ]
    operands = [hidden, head, rows]
    if bias is not None:
        in_specs.append(pl.BlockSpec((1, block_v), lambda _, j: (0, j)))
        operands.append(bias_row(bias, blocks_v * block_v))
    out_specs = [pl.BlockSpec((block_t, block_v), lambda i, j: (i, j))]
    out_shape = [result_like(hidden, (T, V), hidden.dtype)]
    if want_dbias:
        out_specs.append(pl.BlockSpec((None, 1, block_v), lambda i, j: (i, 0, j)))
        out_shape.append(result_like(hidden, (blocks_t, 1, V), f32))
    results = pl.pallas_call(
        functools.partial(
            _dlogits_kernel, options=options, tile=tile, T=T, has_bias=bias is not None
        ),
        out_shape=out_shape,
        grid=(blocks_t, blocks_v),
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tile.vmem_bytes,
        ),
        name="token_logprobs_dlogits",
    )(*operands)
    return results[0], results[1][:, 0] if want_dbias else None


def _dlogits_kernel(*refs: Any, options, tile, T: int, has_bias: bool) -> None:
    hidden, head, rows, *rest = refs
    bias = rest.pop(0) if has_bias else None
    out, *sums = rest
    part_t = tile.block_t // tile.parts
    first_v = pl.program_id(1) * tile.block_v
    shares = []
    for part in range(tile.parts):
        at = slice(part * part_t, (part + 1) * part_t)
        dx_tv = dlogits_tile(hidden[at], head, bias, rows[at], first_v, options)
        out[at] = dx_tv.astype(out.dtype)
        if sums:
            row = lax.broadcasted_iota(jnp.int32, dx_tv.shape, 0)
            exists = pl.program_id(0) * tile.block_t + part * part_t + row < T
            shares.append(jnp.where(exists, dx_tv, 0.0).sum(axis=0, keepdims=True))
    for ref in sums:
        ref[...] = functools.reduce(jnp.add, shares)
