"""The three matmuls of the TPU's backward kernel, each a pipeline of its own.

A step has one code for a whole block, and another for one in which the valid rows or
the vocabulary end: that one goes over the block in pieces, and only over those that it
needs. What is past the end may hold NaN, and 0 * NaN is no zero: it is cleared.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from dpo_kernels.op.interface import LogitOptions
from dpo_kernels.pallas_tpu.backward_tiling import PIECE, PIECE_V, TpuBackwardTile
from dpo_kernels.pallas_tpu.dlogits import LANES, Rows, f32

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
    """Those of a chunk, 0 in padding rows; with them the gradient of the bias.

    Pieces without a valid row, or without an entry of the vocabulary, hold anything.
    """
    if not call.wanted[2]:
        _write_dlogits(x, call, chunk, None)
        return
    columns = call.tile.dlogits.columns
    # A row that is not known when this is compiled needs a dimension of its own.
    sums = pltpu.VMEM((call.tile.chunk_v // columns, 1, columns), f32)

    @functools.partial(pl.run_scoped, dbias_sum=sums)
    def _(dbias_sum: Any) -> None:
        dbias_sum[...] = jnp.zeros_like(dbias_sum)
        _write_dlogits(x, call, chunk, dbias_sum)
        pltpu.sync_copy(dbias_sum, x.dbias.at[chunk.number])


def _write_dlogits(x: Refs, call: Call, chunk: Chunk, dbias_sum: Any) -> None:
    tile, options = call.tile, call.options
    block_t, block_v = tile.dlogits.rows, tile.dlogits.columns
    first = chunk.start_v // block_v  # block of the vocabulary

    def body(hidden: Any, rows: Any, head: Any, *rest: Any) -> None:
        bias, out = (rest[0], rest[1]) if call.has_bias else (None, rest[0])
        i, j = pl.program_id(0), pl.program_id(1)
        first_v = (first + j) * block_v
        left_t, left_v = chunk.num_valid - i * block_t, call.V - first_v

        def product(at_t: Any, at_v: slice) -> Array:
            return matmul(hidden[at_t], head[at_v], (1, 1))

        def finish(
            rows_t: Rows, raw_tv: Array, at_t: Any, start: int, all_there: bool
        ) -> None:
            for at in range(start, start + raw_tv.shape[1], LANES):
                at_v = slice(at, at + LANES)
                bias_v = None if bias is None else bias[:, at_v]
                raw = raw_tv[:, at - start : at - start + LANES]
                dx_tv = rows_t.dlogits(raw, bias_v, at, options)
                if not all_there:
                    row = at_t.start + lax.broadcasted_iota(jnp.int32, dx_tv.shape, 0)
                    column = lax.broadcasted_iota(jnp.int32, dx_tv.shape, 1)
                    exists = (row < left_t) & (column < left_v - at)
                    dx_tv = jnp.where(exists, dx_tv, 0.0)
                out[at_t, at_v] = dx_tv.astype(out.dtype)
                if dbias_sum is not None:
                    dbias_sum[j, :, at_v] += dx_tv.sum(axis=0, keepdims=True)

        def whole() -> None:
            rows_t, last = Rows.of(rows[...], first_v), None
            # While one region is finished, the next one's matmul can run.
            for at_t, at_v in _regions(block_t, block_v):
                following = product(at_t, at_v)
                if last is not None:
                    finish(*last, all_there=True)
                last = rows_t.part(at_t), following, at_t, at_v.start
            assert last is not None, "a block has at least one region"
            finish(*last, all_there=True)

        def piece(at_t: Any) -> None:
            rows_t = Rows.of(rows[at_t], first_v)
            for at_v in _slices(block_v):

                @pl.when(at_v.start < left_v)
                def _(at_v: slice = at_v) -> None:
                    raw_tv = product(at_t, at_v)
                    finish(rows_t, raw_tv, at_t, at_v.start, all_there=False)

        _whole_or_in_pieces(
            (left_t >= block_t) & (left_v >= block_v),
            whole,
            lambda: _for_each_piece(left_t, block_t, PIECE, piece),
        )

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


def _slices(block_v: int) -> Iterator[slice]:
    for at in range(0, block_v, _SLICE_V):
        yield slice(at, min(at + _SLICE_V, block_v))


def _regions(block_t: int, block_v: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of a block of dlogits, one after another.

    Nothing runs beside what is finished last: it has less rows.
    """
    *slices, last = _slices(block_v)
    yield from ((slice(0, block_t), at_v) for at_v in slices)
    part_t = block_t // 2 if block_t % 512 == 0 else block_t
    for at in range(0, block_t, part_t):
        yield slice(at, at + part_t), last


def add_dhidden(x: Refs, call: Call, chunk: Chunk) -> None:
    """What a chunk's dlogits contribute to the gradient of hidden."""
    tile = call.tile.dhidden
    first = chunk.start_v // tile.depth

    def body(dlogits: Any, head: Any, before: Any, out: Any) -> None:
        i, n = pl.program_id(0), pl.program_id(2)
        left_t, left_v = chunk.num_valid - i * tile.rows, chunk.size_v - n * tile.depth

        def whole() -> None:
            share = matmul(dlogits[...], head[...], (1, 0))
            out[...] = jnp.where(n == 0, before[...], out[...]) + share

        def pieces() -> None:
            @pl.when(n == 0)
            def _() -> None:
                out[...] = before[...]

            def add(at_t: Any, at_v: Any) -> None:
                a, b = dlogits[at_t, at_v], head[at_v]
                left = left_v - at_v.start
                out[at_t] += matmul(_first(left, a, 1), _first(left, b, 0), (1, 0))

            def rows(at_t: Any) -> None:
                columns = functools.partial(add, at_t)
                _for_each_piece(left_v, tile.depth, PIECE_V, columns)

            _for_each_piece(left_t, tile.rows, PIECE, rows)

        all_there = (left_t >= tile.rows) & (left_v >= tile.depth)
        _whole_or_in_pieces(all_there, whole, pieces)

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
    first, steps = chunk.start_v // tile.rows, pl.cdiv(chunk.used_t, tile.depth)
    one_step = call.T <= tile.depth

    @functools.partial(pl.run_scoped, total=pltpu.VMEM((tile.rows, tile.columns), f32))
    def _(total: Any) -> None:
        def body(dlogits: Any, hidden: Any, out: Any) -> None:
            n = pl.program_id(2)
            left_t = chunk.num_valid - n * tile.depth

            def whole() -> None:
                share = matmul(dlogits[...], hidden[...], (0, 0))
                if one_step:
                    out[...] = share.astype(out.dtype)
                    return
                # Cast at every step, in slots that a matmul leaves free.
                share += jnp.where(n == 0, 0.0, total[...])
                total[...] = share
                out[...] = share.astype(out.dtype)

            def pieces() -> None:
                @pl.when(n == 0)
                def _() -> None:
                    total[...] = jnp.zeros_like(total)

                def add(at_t: Any) -> None:
                    left = left_t - at_t.start
                    a, b = (_first(left, x[at_t], 0) for x in (dlogits, hidden))
                    total[...] += matmul(a, b, (0, 0))

                _for_each_piece(left_t, tile.depth, PIECE, add)
                out[...] = total[...].astype(out.dtype)

            _whole_or_in_pieces(left_t >= tile.depth, whole, pieces)

        columns = pl.cdiv(call.D, tile.columns)
        pltpu.emit_pipeline(
            body,
            grid=(pl.cdiv(chunk.size_v, tile.rows), columns, steps),
            in_specs=[
                pl.BlockSpec((tile.depth, tile.rows), lambda v, d, n: (n, v)),
                pl.BlockSpec((tile.depth, tile.columns), lambda v, d, n: (n, d)),
            ],
            out_specs=[
                pl.BlockSpec((tile.rows, tile.columns), lambda v, d, n: (first + v, d))
            ],
        )(x.dlogits, x.hidden, x.dhead)


def _whole_or_in_pieces(
    is_whole: Any, whole: Callable[[], None], pieces: Callable[[], None]
) -> None:
    pl.when(is_whole)(whole)
    pl.when(jnp.logical_not(is_whole))(pieces)


def _for_each_piece(
    left: Any, size: int, piece: int, body: Callable[[Any], None]
) -> None:
    """`body(at)` of the pieces of a block of `size` that have some of the first `left`.

    As a loop, the code of one piece.
    """
    piece = min(piece, size)
    assert size % piece == 0, f"{piece=} must divide {size=}"

    def step(k: Any, carry: Any) -> Any:
        body(pl.ds(pl.multiple_of(k * piece, piece), piece))
        return carry

    lax.fori_loop(0, pl.cdiv(jnp.minimum(left, size), piece), step, 0)


def _first(left: Any, x: Array, axis: int) -> Array:
    """The first `left` along an axis, which may be none or all; 0 past them."""
    exists = lax.broadcasted_iota(jnp.int32, x.shape, axis) < left
    return jnp.where(exists, x.astype(f32), 0.0).astype(x.dtype)


def matmul(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Summed in float32 over the two axes of `contract`."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, preferred_element_type=f32)
