"""The TPU's backward kernel: three matmuls in turn over a chunk of the vocabulary.

The first leaves the chunk's dlogits in memory, the others read them: they need not fit
on the chip with both gradients, so the blocks of each matmul are the largest that do.
Each is a pipeline of its own within one kernel, over the rows that are not padding.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dpo_kernels.op.interface import LogitOptions
from dpo_kernels.op.loops import make_varying, result_like, varying_axes
from dpo_kernels.pallas_tpu.backward_tiling import TpuBackwardTile
from dpo_kernels.pallas_tpu.dlogits import f32
from dpo_kernels.pallas_tpu.forward import bias_row, whole_register
from dpo_kernels.pallas_tpu.matmuls import (
    Call,
    Chunk,
    Refs,
    add_dhidden,
    write_dhead,
    write_dlogits,
)
from dpo_kernels.pallas_tpu.tiling import round_up


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
    hidden, head = whole_register(hidden), whole_register(head)
    all_t = round_up(T, tile.dhead.depth)
    columns = tile.dlogits.columns
    call = Call(options, tile, T, V, D, wanted, bias is not None)
    # Past the end: coefficients of 0, as of padding rows.
    rows = jnp.pad(rows, ((0, all_t - T), (0, 0)))
    operands = [valid_rows, hidden, head, rows]
    if bias is not None:
        operands.append(bias_row(bias, tile.cores * tile.share_v))
    out_shape = [result_like(hidden, (tile.cores, all_t, tile.chunk_v), hidden.dtype)]
    aliases = {}
    if wanted[0]:
        shape = (tile.cores, *hidden.shape)
        out_shape.append(result_like(hidden, shape, f32))
        aliases[len(operands)] = 1
        operands.append(make_varying(jnp.zeros(shape, f32), varying_axes(hidden)))
    if wanted[1]:
        out_shape.append(result_like(hidden, head.shape, head.dtype))
    if wanted[2]:
        chunks = pl.cdiv(tile.share_v, tile.chunk_v)
        shape = (tile.cores, chunks, tile.chunk_v // columns, 1, columns)
        out_shape.append(result_like(hidden, shape, f32))
    memory = pl.BlockSpec(memory_space=pltpu.HBM)
    _, *results = pl.pallas_call(
        functools.partial(_kernel, call=call),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tile.cores,),
            in_specs=[memory] * (len(operands) - 1),
            out_specs=[memory] * len(out_shape),
        ),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=tile.vmem_bytes
        ),
        name="token_logprobs_backward",
    )(*operands)
    left = iter(results)
    dhidden, dhead, dbias = (next(left) if want else None for want in wanted)
    if dbias is not None:
        dbias = dbias.reshape(tile.cores, -1)[:, : tile.share_v].reshape(-1)[:V]
    dhidden = None if dhidden is None else dhidden[:, :T]
    return Gradients(dhidden, None if dhead is None else dhead[:V], dbias)


def _kernel(valid: Any, *refs: Any, call: Call) -> None:
    x, tile = Refs.of(refs, call), call.tile
    core = pl.program_id(0)
    x = x._replace(
        dlogits=x.dlogits.at[core],
        dhidden=None if x.dhidden is None else x.dhidden.at[core],
        dbias=None if x.dbias is None else x.dbias.at[core],
    )
    # Of no valid row at all one block is computed: it gives zeros.
    num_valid = valid[0]
    used_t = jnp.maximum(num_valid, 1)
    first_v = core * tile.share_v
    share_v = jnp.minimum(tile.share_v, call.V - first_v)

    def step(n: Any, carry: Any) -> Any:
        start_v, size_v = first_v + n * tile.chunk_v, share_v - n * tile.chunk_v
        size_v = jnp.minimum(tile.chunk_v, size_v)

        @pl.when(size_v > 0)
        def _():
            chunk = Chunk(num_valid, used_t, n, start_v, size_v)
            write_dlogits(x, call, chunk)
            if call.wanted[0]:
                add_dhidden(x, call, chunk)
            if call.wanted[1]:
                write_dhead(x, call, chunk)

        return carry

    lax.fori_loop(0, pl.cdiv(tile.share_v, tile.chunk_v), step, 0)
