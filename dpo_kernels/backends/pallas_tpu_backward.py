"""The TPU's backward kernel: dlogits, and both gradients' matmuls on them, in one.

While a block of the head stays, its gradient beside it in float32, blocks of rows
stream by and have their gradients added to: written back each time, or kept on the chip
throughout where all of them fit (`TpuBackwardTile.resident`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dpo_kernels.backends.pallas_tpu_dlogits import LANES, dlogits_tile, f32, matmul
from dpo_kernels.backends.pallas_tpu_forward import bias_row
from dpo_kernels.interface import LogitOptions
from dpo_kernels.loops import make_varying, result_like, varying_axes
from dpo_kernels.tpu_tiling import REVISIT, TpuBackwardTile


class Gradients(NamedTuple):
    """Sums before scaling; None where not wanted."""

    hidden: Float[Array, "cores T D"] | None  # each core's share
    head: Float[Array, "V D"] | None
    bias: Float[Array, " V"] | None


@jax.enable_x64(False)  # indices are int32
def gradients(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    bias: Float[Array, " V"] | None,
    rows: Float[Array, "T 128"],
    valid_rows: Int[Array, "1"],
    *,
    options: LogitOptions,
    wanted: tuple[bool, bool, bool],
    tile: TpuBackwardTile,
) -> Gradients:
    """Of hidden, head and bias, from `pack_rows` and the rows' own inputs.

    The coefficients of padding rows are 0; their `hidden` may hold anything.
    """
    (T, D), V = hidden.shape, head.shape[0]
    block_t, block_v = tile.block_t, tile.block_v
    blocks_t, blocks_v = pl.cdiv(T, block_t), pl.cdiv(V, block_v)
    each = pl.cdiv(blocks_v, tile.cores)  # vocabulary blocks of a core
    call = _Call(options, tile, V, wanted, bias is not None, each, blocks_t)

    def at_v(c: Any, j: Any, i: Any, valid: Any) -> tuple[Any, int]:
        return jnp.minimum(c * each + j, blocks_v - 1), 0

    def at_t(c: Any, j: Any, i: Any, valid: Any) -> tuple[Any, int]:
        used = _used_blocks(valid[0], blocks_t, tile)
        # A core's last block of the vocabulary may be one too many: nothing moves.
        exists = c * each + j < blocks_v
        return jnp.where(exists, _row_block(i, blocks_t - used), used - 1), 0

    if tile.resident:
        all_rows = blocks_t * block_t
        once = pl.Buffered(1)
        hidden_spec = pl.BlockSpec((all_rows, D), lambda *_: (0, 0), pipeline_mode=once)
        dhidden_spec = pl.BlockSpec(
            (None, all_rows, D), lambda c, *_: (c, 0, 0), pipeline_mode=once
        )
    else:
        hidden_spec = pl.BlockSpec((block_t, D), at_t)
        dhidden_spec = pl.BlockSpec(
            (None, block_t, D), lambda c, *at: (c, *at_t(c, *at))
        )
    in_specs = [
        hidden_spec,
        pl.BlockSpec((block_v, D), at_v),
        pl.BlockSpec((block_t, LANES), at_t),
    ]
    # Past the end: coefficients of 0, as of padding rows.
    rows = jnp.pad(rows, ((0, blocks_t * block_t - T), (0, 0)))
    operands = [valid_rows, hidden, head, rows]
    row_of_v = pl.BlockSpec((1, block_v), lambda *at: at_v(*at)[::-1])
    if bias is not None:
        in_specs.append(row_of_v)
        operands.append(bias_row(bias, blocks_v * block_v))
    out_specs, out_shape, aliases = [], [], {}
    if wanted[0]:
        shape = (tile.cores, blocks_t * block_t, D)
        out_specs.append(dhidden_spec)
        out_shape.append(result_like(hidden, shape, f32))
        if not tile.resident:
            aliases[len(operands)] = 0
            in_specs.append(dhidden_spec)
            operands.append(make_varying(jnp.zeros(shape, f32), varying_axes(hidden)))
    if wanted[1]:
        out_specs.append(pl.BlockSpec((block_v, D), at_v))
        out_shape.append(result_like(hidden, (V, D), head.dtype))
    if wanted[2]:
        out_specs.append(row_of_v)
        out_shape.append(result_like(hidden, (1, V), f32))
    results = pl.pallas_call(
        functools.partial(_kernel, call=call),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tile.cores, each, blocks_t),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((block_v, D), f32)] * wanted[1],
        ),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tile.vmem_bytes,
        ),
        name="token_logprobs_backward",
    )(*operands)
    left = iter(results)
    dhidden, dhead, dbias = (next(left) if want else None for want in wanted)
    dhidden = None if dhidden is None else dhidden[:, :T]
    return Gradients(dhidden, dhead, None if dbias is None else dbias[0])


class _Call(NamedTuple):
    options: LogitOptions
    tile: TpuBackwardTile
    V: int
    wanted: tuple[bool, bool, bool]
    has_bias: bool
    blocks_each: int  # of the vocabulary, for a core
    blocks_t: int


class _Refs(NamedTuple):
    """What a step sees; None where there is none of it."""

    hidden: Any
    head: Any
    rows: Any
    bias: Any
    before: Any  # gradient of hidden so far, where it is streamed
    dhidden: Any
    dhead: Any
    dbias: Any
    dhead_sum: Any

    @classmethod
    def of(cls, refs: tuple[Any, ...], call: _Call) -> "_Refs":
        want_hidden, want_head, want_bias = call.wanted
        streamed = want_hidden and not call.tile.resident
        there = (True, True, True, call.has_bias, streamed, *call.wanted, want_head)
        left = iter(refs)
        return cls(*(next(left) if has else None for has in there))


def _used_blocks(valid: Any, blocks_t: int, tile: TpuBackwardTile) -> Any:
    """Row blocks that are computed: one at least, which then writes zeros.

    Streaming ones so many that a block is on its way back before it is asked for anew.
    """
    least = 1 if tile.resident else min(REVISIT, blocks_t)
    return jnp.maximum(pl.cdiv(valid, tile.block_t), least)


def _row_block(i: Any, skipped: Any) -> Any:
    """Of step `i` of a block of the vocabulary, of which 1 to `skipped` do nothing.

    Those come after the first: behind its matmuls the block before is written back,
    behind the last step's the next one is fetched. They move nothing.
    """
    return jnp.maximum(i - skipped, 0)


def _kernel(valid: Any, *refs: Any, call: _Call) -> None:
    x, tile = _Refs.of(refs, call), call.tile
    j, i = pl.program_id(1), pl.program_id(2)
    block_t, block_v = tile.block_t, tile.block_v
    block = pl.program_id(0) * call.blocks_each + j
    last_block = pl.cdiv(call.V, block_v) - 1
    skipped = call.blocks_t - _used_blocks(valid[0], call.blocks_t, tile)
    row_block = _row_block(i, skipped)
    used = (block <= last_block) & ((i == 0) | (i > skipped))
    start = pl.multiple_of(row_block * block_t, block_t) if tile.resident else 0

    if tile.resident and x.dhidden is not None:

        @pl.when(j == 0)
        def _():
            zeros = jnp.zeros((block_t, x.head.shape[1]), f32)
            x.dhidden[pl.ds(pl.multiple_of(i * block_t, block_t), block_t)] = zeros

    # What is past the end of an array, or of the valid rows, may hold NaN, and 0 * NaN
    # is no zero in the matmuls.
    if tail := call.V % block_v:
        first = tail // 16 * 16

        @pl.when(used & (block == last_block) & (i == 0))
        def _():
            _clear(x.head, first, block_v - first, tail - first)

    first_visit = (j == 0) if tile.resident else True

    @pl.when(used & first_visit & (valid[0] < (row_block + 1) * block_t))
    def _():
        _clear(x.hidden, start, block_t, valid[0] - row_block * block_t)

    @pl.when(used)
    def _():
        _tile(x, i == 0, start, block * block_v, call)

    if x.dhead is not None:

        @pl.when((block <= last_block) & (i == call.blocks_t - 1))
        def _():
            x.dhead[...] = x.dhead_sum[...].astype(x.dhead.dtype)


def _clear(ref: Any, start: Any, size: int, keep: Any) -> None:
    """Writes zeros to `size` rows from `start` on, but not to the first `keep`."""
    x = ref[pl.ds(start, size)]
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    kept = jnp.where(row < keep, x.astype(f32), 0.0)
    ref[pl.ds(start, size)] = kept.astype(ref.dtype)


def _tile(x: _Refs, is_first: Any, start: Any, first_v: Any, call: _Call) -> None:
    """One tile, in parts: while one part's matmuls run, the next one's dlogits do."""
    part_t = call.tile.block_t // call.tile.parts
    head_shares, bias_shares = [], []

    def of_part(part: int) -> tuple[Array, Array]:
        hidden_t = x.hidden[pl.ds(start + part * part_t, part_t)]
        rows_t = x.rows[part * part_t : (part + 1) * part_t]
        dx_tv = dlogits_tile(hidden_t, x.head, x.bias, rows_t, first_v, call.options)
        return hidden_t, dx_tv

    following = of_part(0)
    for part in range(call.tile.parts):
        hidden_t, dx_tv = following
        if part + 1 < call.tile.parts:
            following = of_part(part + 1)
        dlogits_tv = dx_tv.astype(x.head.dtype)
        if x.dhidden is not None:
            at = pl.ds(start + part * part_t, part_t)
            before = x.dhidden if x.before is None else x.before
            x.dhidden[at] = before[at] + matmul(dlogits_tv, x.head[...], (1, 0))
        if x.dhead is not None:
            head_shares.append(matmul(dlogits_tv, hidden_t, (0, 0)))
        if x.dbias is not None:
            bias_shares.append(dx_tv.sum(axis=0, keepdims=True))
    _accumulate(x.dhead_sum, head_shares, is_first)
    _accumulate(x.dbias, bias_shares, is_first)


def _accumulate(ref: Any, shares: list[Array], is_first: Any) -> None:
    if shares:
        before = jnp.where(is_first, 0.0, ref[...])
        ref[...] = functools.reduce(jnp.add, shares, before)
