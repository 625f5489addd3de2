"""The three matmuls of the TPU's backward kernel, each a pipeline of its own."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from dpo_kernels.backends.pallas_tpu_dlogits import LANES, dlogits_of, f32
from dpo_kernels.interface import LogitOptions
from dpo_kernels.tpu_backward_tiling import TpuBackwardTile

_SLICE_V = 512  # of a block of dlogits: one's are finished during the next one's matmul


class Call(NamedTuple):
    """What a kernel is compiled for."""

    options: LogitOptions
    tile: TpuBackwardTile
    T: int
    V: int
    D: int
    wanted: tuple[bool, bool, bool]
    has_bias: bool


class Chunk(NamedTuple):
    """Numbers that a kernel has computed."""

    num_valid: Any  # rows
    used_t: Any  # rows that are computed
    number: Any  # among those of a core
    start_v: Any
    size_v: Any  # in the last one less than the tile's


class Refs(NamedTuple):
    """What the kernel sees; None where there is none of it."""

    hidden: Any
    head: Any
    rows: Any
    bias: Any
    zeros: Any  # the memory of `dhidden`
    dlogits: Any
    dhidden: Any
    dhead: Any
    dbias: Any

    @classmethod
    def of(cls, refs: tuple[Any, ...], call: Call) -> "Refs":
        """By name, from those that a kernel is called with."""
        inputs = (True, True, True, call.has_bias, call.wanted[0])
        there = (*inputs, True, *call.wanted)
        left = iter(refs)
        return cls(*(next(left) if has else None for has in there))


def write_dlogits(x: Refs, call: Call, chunk: Chunk) -> None:
    """Those of a chunk, 0 in padding rows; with them the gradient of the bias."""
    if not call.wanted[2]:
        _write_dlogits(x, call, chunk, None)
        return
    columns = call.tile.dlogits.columns
    sums = pltpu.VMEM((call.tile.chunk_v // columns, columns), f32)

    @functools.partial(pl.run_scoped, dbias_sum=sums)
    def _(dbias_sum: Any) -> None:
        _write_dlogits(x, call, chunk, dbias_sum)
        pltpu.sync_copy(dbias_sum, x.dbias.at[chunk.number])


def _write_dlogits(x: Refs, call: Call, chunk: Chunk, dbias_sum: Any) -> None:
    tile, options = call.tile, call.options
    block_t, block_v = tile.dlogits.rows, tile.dlogits.columns
    first = chunk.start_v // block_v  # block of the vocabulary

    def body(hidden: Any, rows: Any, head: Any, *rest: Any) -> None:
        bias, out = (rest[0], rest[1]) if call.has_bias else (None, rest[0])
        i, j = pl.program_id(0), pl.program_id(1)
        # What is past the end of an array, or of the valid rows, may hold NaN.
        left_t, left_v = chunk.num_valid - i * block_t, call.V - (first + j) * block_v
        sums = []

        def finish(raw_tv: Array, at: slice) -> None:
            bias_v = None if bias is None else bias[:, at]
            first_v = (first + j) * block_v + at.start
            dx_tv = dlogits_of(raw_tv, bias_v, rows[...], first_v, options)
            out[:, at] = dx_tv.astype(out.dtype)
            if dbias_sum is not None:
                row = lax.broadcasted_iota(jnp.int32, dx_tv.shape, 0)
                dx_tv = jnp.where(row < left_t, dx_tv, 0.0)
                sums.append(dx_tv.sum(axis=0, keepdims=True))

        # While one slice is finished, the next one's matmul can run.
        following, last = None, None
        width = min(_SLICE_V, block_v)
        for at in range(0, block_v, width):
            at_v = slice(at, at + width)
            following = matmul(hidden[...], head[at_v], (1, 1))
            if last is not None:
                finish(*last)
            last = following, at_v
        assert last is not None, "a block has at least one slice"
        finish(*last)
        if sums:
            total = jnp.concatenate(sums, axis=1)
            at_block = pl.ds(j, 1)
            before = jnp.where(i == 0, 0.0, dbias_sum[at_block])
            dbias_sum[at_block] = before + total

        @pl.when((left_t < block_t) | (left_v < block_v))
        def _():
            row = lax.broadcasted_iota(jnp.int32, out.shape, 0)
            column = lax.broadcasted_iota(jnp.int32, out.shape, 1)
            exists = (row < left_t) & (column < left_v)
            kept = jnp.where(exists, out[...].astype(f32), 0.0)
            out[...] = kept.astype(out.dtype)

    buffered = pl.Buffered(tile.hidden_buffers)
    in_specs = [
        pl.BlockSpec((block_t, call.D), lambda i, j: (i, 0), pipeline_mode=buffered),
        pl.BlockSpec((block_t, LANES), lambda i, j: (i, 0)),
        pl.BlockSpec((block_v, call.D), lambda i, j: (first + j, 0)),
    ]
    operands = [x.hidden, x.rows, x.head]
    if call.has_bias:
        in_specs.append(pl.BlockSpec((1, block_v), lambda i, j: (0, first + j)))
        operands.append(x.bias)
    pltpu.emit_pipeline(
        body,
        grid=(pl.cdiv(chunk.used_t, block_t), pl.cdiv(chunk.size_v, block_v)),
        in_specs=in_specs,
        out_specs=[pl.BlockSpec((block_t, block_v), lambda i, j: (i, j))],
    )(*operands, x.dlogits)


def add_dhidden(x: Refs, call: Call, chunk: Chunk) -> None:
    """What a chunk's dlogits contribute to the gradient of hidden."""
    tile = call.tile.dhidden
    first = chunk.start_v // tile.depth

    def body(dlogits: Any, head: Any, before: Any, out: Any) -> None:
        n = pl.program_id(2)
        left_v = chunk.size_v - n * tile.depth

        def add(share: Array) -> None:
            out[...] = jnp.where(n == 0, before[...], out[...]) + share

        _sum_over(dlogits, head, (1, 0), left_v, call.V % tile.depth != 0, add)

    pltpu.emit_pipeline(
        body,
        grid=(
            pl.cdiv(chunk.used_t, tile.rows),
            pl.cdiv(call.D, tile.columns),
            pl.cdiv(chunk.size_v, tile.depth),
        ),
        in_specs=[
            pl.BlockSpec((tile.rows, tile.depth), lambda i, d, n: (i, n)),
            pl.BlockSpec((tile.depth, tile.columns), lambda i, d, n: (first + n, d)),
            pl.BlockSpec((tile.rows, tile.columns), lambda i, d, n: (i, d)),
        ],
        out_specs=[pl.BlockSpec((tile.rows, tile.columns), lambda i, d, n: (i, d))],
    )(x.dlogits, x.head, x.dhidden, x.dhidden)


def write_dhead(x: Refs, call: Call, chunk: Chunk) -> None:
    """The gradient of a chunk of the head, from its dlogits."""
    tile = call.tile.dhead
    if call.T <= tile.depth:
        _write_dhead(x, call, chunk, None)
        return
    total = pltpu.VMEM((tile.rows, tile.columns), f32)
    pl.run_scoped(functools.partial(_write_dhead, x, call, chunk), total)


def _write_dhead(x: Refs, call: Call, chunk: Chunk, total: Any) -> None:
    tile = call.tile.dhead
    first, steps = chunk.start_v // tile.rows, pl.cdiv(chunk.used_t, tile.depth)

    def body(dlogits: Any, hidden: Any, out: Any) -> None:
        n = pl.program_id(2)

        def add(share: Array) -> None:
            if total is None:
                out[...] = share.astype(out.dtype)
                return
            total[...] = jnp.where(n == 0, 0.0, total[...]) + share

            @pl.when(n == steps - 1)
            def _():
                out[...] = total[...].astype(out.dtype)

        _sum_over(dlogits, hidden, (0, 0), chunk.num_valid - n * tile.depth, True, add)

    pltpu.emit_pipeline(
        body,
        grid=(pl.cdiv(chunk.size_v, tile.rows), pl.cdiv(call.D, tile.columns), steps),
        in_specs=[
            pl.BlockSpec((tile.depth, tile.rows), lambda v, d, n: (n, v)),
            pl.BlockSpec((tile.depth, tile.columns), lambda v, d, n: (n, d)),
        ],
        out_specs=[
            pl.BlockSpec((tile.rows, tile.columns), lambda v, d, n: (first + v, d))
        ],
    )(x.dlogits, x.hidden, x.dhead)


def _sum_over(
    a: Any, b: Any, contract: tuple[int, int], left: Any, may_end: bool, add: Any
) -> None:
    """`add` the product, of which only the first `left` terms of each sum exist.

    What is past them may hold NaN in both operands, and 0 * NaN is no zero.
    """
    size = a.shape[contract[0]]

    def product(clear: bool) -> None:
        operands = []
        for ref, axis in ((a, contract[0]), (b, contract[1])):
            x = ref[...]
            if clear:
                exists = lax.broadcasted_iota(jnp.int32, x.shape, axis) < left
                x = jnp.where(exists, x.astype(f32), 0.0).astype(x.dtype)
            operands.append(x)
        add(matmul(operands[0], operands[1], contract))

    if not may_end:
        product(clear=False)
        return
    pl.when(left >= size)(functools.partial(product, clear=False))
    pl.when(left < size)(functools.partial(product, clear=True))


def matmul(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Summed in float32 over the two axes of `contract`."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=f32)
