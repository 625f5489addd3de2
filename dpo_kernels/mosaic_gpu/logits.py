"""Arithmetic on a tile of logits in a warpgroup's registers, and its way to memory."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpo_kernels.mosaic_gpu.pipeline import COLUMNS, ROWS, WARPGROUPS, swizzled
from dpo_kernels.op.gpu_tiling import MosaicTile
from dpo_kernels.op.interface import LogitOptions

LOG2E = math.log2(math.e)
STORE_SLOTS = 2  # pieces of a tile that can be on their way to memory


def rows_of(x: jax.Array, like: jax.Array) -> jax.Array:
    """A value for each row, in all columns."""
    return lax.broadcast_in_dim(x, like.shape, (0,))


def columns(like: jax.Array) -> jax.Array:
    """The number of each column, from 0."""
    return plgpu.broadcasted_iota(jnp.int32, like.shape, 1, layout=plgpu.Layout.WGMMA)


def pieces_of(acc: jax.Array, column: Any, width: int) -> list[tuple[jax.Array, Any]]:
    """Slices of columns, each with its first vocabulary entry.

    Working on a few at a time keeps what is derived from them within the registers
    that the accumulator leaves.
    """
    starts = range(0, acc.shape[1], width)
    return [(acc[:, start : start + width], column + start) for start in starts]


def unit_of(options: LogitOptions, bias_g: Any) -> float:
    """Of `to_logits`, in nats: a scale alone goes into the factor that exp2 needs."""
    folded = options.softcap is None and bias_g is None and options.scale > 0
    return options.scale if folded else 1.0


def to_logits(
    acc: jax.Array, column: Any, bias_g: Any, end: int | None, options: LogitOptions
) -> jax.Array:
    """Logits in units of `unit_of`, -inf where the bias is -inf or from `end` on.

    `bias_g` is padded with -inf. What an option would do costs nothing where it is off.
    """
    z = acc if unit_of(options, bias_g) == options.scale else acc * options.scale
    bias = None
    if bias_g is not None:
        here = bias_g.at[pl.ds(column, acc.shape[1])]
        bias = plgpu.load(here, layout=COLUMNS, optimized=False)
        bias = lax.broadcast_in_dim(bias, acc.shape, (1,))
        z += bias
    if options.softcap is not None:
        # tanh from exp2, as the hardware's own is good to 11 bits only. Of -inf it is
        # -1: what does not exist is masked after the cap.
        z = jnp.exp2(z * (2 * LOG2E / options.softcap))
        z = options.softcap - 2 * options.softcap / (z + 1.0)
        if bias is not None:
            z = jnp.where(bias == -jnp.inf, -jnp.inf, z)
    if bias is None and end is not None:
        # The branch is the whole warpgroup's: only the last tile pays for the mask.
        left = end - column
        z = lax.cond(
            left < z.shape[1],
            lambda z: jnp.where(columns(z) < left, z, -jnp.inf),
            lambda z: z,
            z,
        )
    return z


def slope(z: jax.Array, softcap: float) -> jax.Array:
    """The soft-cap's derivative, from what it returned; 0 where nothing exists."""
    return jnp.where(z == -jnp.inf, 0.0, 1.0 - (z * (1 / softcap)) ** 2)


def store_piece(piece: jax.Array, out_g: Any, row: Any, column: Any, at: Any) -> None:
    """Write part of a tile to memory while others are being computed.

    `at` is one of `STORE_SLOTS` buffers, taken in turn.
    """
    plgpu.wait_smem_to_gmem(STORE_SLOTS - 1, wait_read_only=True)
    at[...] = piece
    plgpu.commit_smem()
    here = pl.ds(row, piece.shape[0]), pl.ds(column, piece.shape[1])
    plgpu.copy_smem_to_gmem(at, out_g.at[here])


def piece_width(most: int, out_v: int) -> int:
    """Entries of a piece: the copy engine needs them to divide a row of the output."""
    return next(width for width in (64, 32, 16) if width <= most and not out_v % width)


def staging(tile: MosaicTile, dtype: Any, width: int) -> Any:
    """Shared memory for pieces on their way: STORE_SLOTS for each warpgroup."""
    shape = WARPGROUPS, STORE_SLOTS, tile.block_t // WARPGROUPS, width
    return plgpu.SMEM(shape, dtype, transforms=swizzled(width, dtype))


def load_rows(refs: Sequence[Any], row: Any, height: int) -> list[jax.Array]:
    """Of each of `refs` the values of so many rows from `row` on, in registers."""
    rows = pl.ds(row, height)
    return [plgpu.load(x.at[rows], layout=ROWS, optimized=False) for x in refs]
