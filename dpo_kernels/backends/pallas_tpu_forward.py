"""The TPU's forward kernel: tiles of logits that never leave the chip.

A block of rows stays while the head streams past it once. In each step the matrix units
compute one tile while the vector units reduce the tile before it, in code without a
branch between the two, so that the compiler's scheduler can interleave them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dpo_kernels.interface import LogitOptions, capped
from dpo_kernels.loops import result_like
from dpo_kernels.tpu_tiling import SLICE_V, TpuForwardTile

LANES = 128
_LEAST = float(jnp.finfo(jnp.float32).min)  # finite: below any logit that is not masked
# Running values of a row, a number for each lane: of the entries v with v % 128 = lane.
_ALWAYS = ("max", "sum_exp", "target_logit")
_OF_STATS = {
    "entropy": "sum_exp_z",
    "collision": "sum_exp2",
    "mean_logit": "sum_logit",
}


def state_names(options: LogitOptions) -> tuple[str, ...]:
    """The fields of `Partials` that the kernel computes, in the order of its output."""
    return _ALWAYS + tuple(n for stat, n in _OF_STATS.items() if stat in options.stats)


def bias_row(bias: Float[Array, " V"], size: int) -> Float[Array, "1 size"]:
    """Float32, masked from V on: the operand of a kernel over whole blocks."""
    padding = (0, size - bias.shape[0])
    return jnp.pad(bias.astype(jnp.float32), padding, constant_values=-jnp.inf)[None]


@jax.enable_x64(False)  # indices are int32
def forward(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " T"],
    bias: Float[Array, " V"] | None,
    valid_rows: Int[Array, "1"],
    *,
    options: LogitOptions,
    tile: TpuForwardTile,
) -> Float[Array, "states T 128"]:
    """The running values of `state_names`, for each row and lane.

    Blocks of rows that hold no valid row are not computed.
    """
    (T, D), V = hidden.shape, head.shape[0]
    block_t, block_v = tile.block_t, tile.block_v
    blocks_v, states = pl.cdiv(V, block_v), len(state_names(options))

    # A block without valid rows asks for what is there already: nothing is copied.
    def row_block(i: Any, j: Any, valid: Any) -> Any:
        last = jnp.maximum(pl.cdiv(valid[0], block_t) - 1, 0)
        return jnp.minimum(_block_of_rows(i, T, tile), last)

    def head_block(i: Any, j: Any, valid: Any) -> Any:
        i = _block_of_rows(i, T, tile)
        # The step that only reduces waits for the first block, to be used again next.
        streams = (i * block_t < valid[0]) & (j < blocks_v)
        return jnp.where(streams, j, 0)

    rows = [
        pl.BlockSpec(
            (block_t, D),
            lambda *at: (row_block(*at), 0),
            pipeline_mode=pl.Buffered(tile.hidden_buffers),
        ),
        pl.BlockSpec((block_v, D), lambda *at: (head_block(*at), 0)),
        pl.BlockSpec((block_t, 1), lambda *at: (row_block(*at), 0)),
    ]
    operands = [valid_rows, hidden, head, targets[:, None]]
    if bias is not None:
        rows.append(pl.BlockSpec((1, block_v), lambda *at: (0, head_block(*at))))
        operands.append(bias_row(bias, blocks_v * block_v))
    return pl.pallas_call(
        functools.partial(
            _kernel, options=options, tile=tile, T=T, V=V, has_bias=bias is not None
        ),
        out_shape=result_like(hidden, (states, T, LANES), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            # One step more: it reduces the last tile.
            grid=(pl.cdiv(T, block_t), blocks_v + 1),
            in_specs=rows,
            # Its own also of a block without valid rows, which another core may have.
            out_specs=pl.BlockSpec(
                (states, block_t, LANES),
                lambda i, j, valid: (0, _block_of_rows(i, T, tile), 0),
            ),
            scratch_shapes=[
                pltpu.VMEM((block_t // 2, D), jnp.uint32),
                pltpu.VMEM((block_t, block_v), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tile.vmem_bytes,
        ),
        name="token_logprobs_forward",
    )(*operands)


def _block_of_rows(i: Any, T: int, tile: TpuForwardTile) -> Any:
    """Of the grid's first axis, whose first half is one core's: every other block.

    Valid rows come first: in halves the second core would have the padding.
    """
    if tile.cores == 1:
        return i
    half = pl.cdiv(pl.cdiv(T, tile.block_t), 2)
    return jnp.where(i < half, 2 * i, 2 * (i - half) + 1)


def _kernel(
    valid, hidden, head, targets, *rest, options: LogitOptions, tile, T, V, has_bias
):
    bias = rest[0] if has_bias else None
    states, packed, logits = rest[-3:]
    i, j = _block_of_rows(pl.program_id(0), T, tile), pl.program_id(1)
    blocks_v = pl.cdiv(V, tile.block_v)
    used = i * tile.block_t < valid[0]
    names = state_names(options)
    start = {"max": _LEAST, "target_logit": -jnp.inf}

    @pl.when(used & (j == 0))
    def _():
        # Two rows in a word, as the matrix units take them: done once, not per tile.
        packed[...] = pltpu.bitcast(hidden[...], jnp.uint32)
        logits[...] = jnp.full_like(logits, -jnp.inf)
        for n, name in enumerate(names):
            states[n] = jnp.full(states.shape[1:], start.get(name, 0.0), jnp.float32)

    step = functools.partial(
        _step, packed, head, targets, bias, states, logits, j, options, tile, V
    )
    pl.when(used & (j < blocks_v))(functools.partial(step, multiply=True))

    @pl.when(used & (j == blocks_v))
    def _():
        step(multiply=False)
        top = states[0]
        states[0] = jnp.where(top == _LEAST, -jnp.inf, top)


def _step(
    packed, head, targets, bias, states, logits, j, options, tile, V, *, multiply: bool
):
    """Reduces the tile before `j` and, with `multiply`, computes that of `j`."""
    block_t, block_v = tile.block_t, tile.block_v
    names = state_names(options)
    state = dict(zip(names, (states[n] for n in range(len(names))), strict=True))
    shift = top = state["max"]
    may_be_masked = bias is not None or V % block_v != 0
    lane = lax.broadcasted_iota(jnp.int32, (block_t, LANES), 1)
    target = jnp.broadcast_to(targets[...], (block_t, LANES)) - (j - 1) * block_v
    for first in range(0, block_v, SLICE_V):
        for at in range(first, first + SLICE_V, LANES):
            z = logits[:, at : at + LANES]
            _reduce(state, z, shift, lane + at == target, may_be_masked)
        if multiply:
            slice_v = slice(first, first + SLICE_V)
            z_tv = lax.dot_general(
                pltpu.bitcast(packed[...], head.dtype),
                head[slice_v],
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            bias_v = None if bias is None else bias[:, slice_v]
            exists = None
            if first + SLICE_V > V % block_v > 0:
                column = first + lax.broadcasted_iota(jnp.int32, (1, SLICE_V), 1)
                exists = column < V - j * block_v
            z_tv = masked_logits(z_tv, bias_v, exists, options)
            logits[:, slice_v] = z_tv
            for at in range(0, SLICE_V, LANES):
                top = jnp.maximum(top, z_tv[:, at : at + LANES])
    if multiply:
        state["max"] = top
        factor = jnp.exp(shift - top)
        for name in ("sum_exp", "sum_exp_z", "sum_exp2"):
            if name in state:
                state[name] *= factor * factor if name == "sum_exp2" else factor
    for n, name in enumerate(names):
        states[n] = state[name]


def _reduce(state, z, shift, hit, may_be_masked: bool) -> None:
    """Adds 128 columns of logits to the running values."""
    e = jnp.exp(z - shift)
    state["sum_exp"] += e
    state["target_logit"] = jnp.where(hit, z, state["target_logit"])
    if "sum_exp2" in state:
        state["sum_exp2"] += e * e
    if "sum_exp_z" in state or "sum_logit" in state:
        # 0 * -inf would be NaN. The first step reduces -inf in place of a tile.
        finite = jnp.where(z == -jnp.inf, 0.0, z)
        if "sum_exp_z" in state:
            state["sum_exp_z"] += e * finite
        if "sum_logit" in state:
            state["sum_logit"] += finite


def masked_logits(raw_tv, bias_v, exists, options: LogitOptions):
    """z = cap(scale * raw + bias); -inf where the bias is, or nothing exists."""
    x_tv = raw_tv if options.scale == 1 else options.scale * raw_tv
    if bias_v is not None:
        if options.softcap is None:
            x_tv = x_tv + bias_v
        else:
            x_tv = x_tv + jnp.where(bias_v == -jnp.inf, 0.0, bias_v)
    z_tv = capped(x_tv, options.softcap)
    if bias_v is not None and options.softcap is not None:
        # The cap comes first: capped, a masked -inf would be a finite -softcap.
        z_tv = jnp.where(bias_v == -jnp.inf, -jnp.inf, z_tv)
    return z_tv if exists is None else jnp.where(exists, z_tv, -jnp.inf)
