"""The TPU's forward kernel: tiles of logits that never leave the chip.

A block of rows stays while the head streams past it once, in slices: the matrix units
compute one while the vector units reduce the one before it, in code without a branch
between the two, so that the compiler's scheduler can interleave them. A tile's last
slice is left to the next tile's step. The vocabulary's last tile has a step of its own,
which multiplies what there is, and no more, and leaves nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dpo_kernels.op.interface import LogitOptions, capped
from dpo_kernels.op.loops import result_like
from dpo_kernels.pallas_tpu.rows import PackedRows, scratch_shapes
from dpo_kernels.pallas_tpu.tiling import (
    FORWARD_SLICE_V,
    ROWS,
    SLICE_V,
    TpuForwardTile,
    round_up,
)

LANES = 128
_LEAST = float(jnp.finfo(jnp.float32).min)  # finite: below any logit that is not masked
# Running values of a row, a number for each lane: of the entries v with v % 128 = lane.
_ALWAYS = ("max", "sum_exp", "target_logit")
_OF_STATS = {
    "entropy": "sum_exp_diff",
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


def whole_register(x: Array) -> Array:
    """Padded to a register's rows: of fewer, memory has tiles that are less high."""
    return jnp.pad(x, ((0, max(0, ROWS - x.shape[0])), (0, 0)))


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
) -> Float[Array, "states cores T 128"]:
    """The running values of `state_names`, for each core, row and lane.

    Blocks of rows that hold no valid row are not computed.
    """
    (T, D), V = hidden.shape, head.shape[0]
    block_t, block_v = tile.block_t, tile.block_v
    blocks_v, states = pl.cdiv(V, block_v), len(state_names(options))

    # A block without valid rows names the blocks that are in memory: none is copied.
    def row_block(core: Any, i: Any, j: Any, valid: Any) -> Any:
        last = jnp.maximum(pl.cdiv(valid[0], block_t) - 1, 0)
        return jnp.minimum(i, last)

    def head_block(core: Any, i: Any, j: Any, valid: Any) -> Any:
        block = jnp.minimum(core * tile.blocks_of_core(V) + j, blocks_v - 1)
        return jnp.where(i * block_t < valid[0], block, 0)

    rows = [
        pl.BlockSpec(memory_space=pltpu.HBM),
        pl.BlockSpec((block_v, D), lambda *at: (head_block(*at), 0)),
        pl.BlockSpec((block_t, 1), lambda *at: (row_block(*at), 0)),
    ]
    operands = [valid_rows, whole_register(hidden), head, targets[:, None]]
    if bias is not None:
        rows.append(pl.BlockSpec((1, block_v), lambda *at: (0, head_block(*at))))
        operands.append(bias_row(bias, blocks_v * block_v))
    return pl.pallas_call(
        functools.partial(
            _kernel, options=options, tile=tile, V=V, has_bias=bias is not None
        ),
        out_shape=result_like(hidden, (states, tile.cores, T, LANES), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tile.cores, pl.cdiv(T, block_t), tile.blocks_of_core(V)),
            in_specs=rows,
            out_specs=pl.BlockSpec(
                (states, None, block_t, LANES),
                lambda core, i, j, valid: (0, core, i, 0),
            ),
            scratch_shapes=[
                pltpu.VMEM((block_t, min(block_v, FORWARD_SLICE_V)), jnp.float32),
                *scratch_shapes(tile, D, hidden.dtype),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tile.vmem_bytes,
        ),
        name="token_logprobs_forward",
    )(*operands)


def _kernel(
    valid, hidden, head, targets, *rest, options: LogitOptions, tile, V, has_bias
):
    bias = rest[0] if has_bias else None
    states, logits, *scratch = rest[has_bias:]
    rows = PackedRows(hidden, tuple(scratch), tile, valid[0])
    core, i, j = (pl.program_id(n) for n in range(3))
    first = core * tile.blocks_of_core(V)  # block of the vocabulary
    last = jnp.minimum(tile.blocks_of_core(V), pl.cdiv(V, tile.block_v) - first) - 1
    used = i * tile.block_t < valid[0]
    names = state_names(options)
    start = {"max": _LEAST, "target_logit": -jnp.inf}

    @pl.when(used & (j == 0))
    def _():
        rows.load(i)
        logits[...] = jnp.full_like(logits, -jnp.inf)
        for n, name in enumerate(names):
            states[n] = jnp.full(states.shape[1:], start.get(name, 0.0), jnp.float32)

    step = functools.partial(
        _step, rows, head, targets, bias, states, logits, first + j, options, tile, V
    )
    pl.when(used & (j < last))(functools.partial(step, ends=False))
    pl.when(used & (j == last))(functools.partial(step, ends=True))

    @pl.when(used & (j == jnp.maximum(last, 0)))
    def _():
        top = states[0]
        states[0] = jnp.where(top == _LEAST, -jnp.inf, top)


def _step(
    rows, head, targets, bias, states, logits, block, options, tile, V, *, ends: bool
):
    """Multiplies a block of the vocabulary, and reduces.

    What is reduced starts with the slice that the step before has left, and lacks the
    block's own last one, unless the core's share of the vocabulary `ends` with it. Of
    the rows, parts take turns in the matrix units.
    """
    block_v, width = tile.block_v, logits.shape[1]
    part_t = tile.block_t // tile.parts
    parts = [
        _Part(slice(at, at + part_t), targets, states, logits, block * block_v, options)
        for at in range(0, tile.block_t, part_t)
    ]
    # What there is of a block with which one core ends, in whole matrix units; those
    # of several cores share the code.
    size_v = round_up(V % block_v, SLICE_V) if ends and tile.cores == 1 else 0
    size_v = size_v or block_v
    for first in range(0, size_v, width):
        slice_v = slice(first, min(first + width, size_v))
        exists = None
        if ends and V % block_v and (tile.cores > 1 or slice_v.stop > V % block_v):
            shape = (1, slice_v.stop - first)
            column = first + lax.broadcasted_iota(jnp.int32, shape, 1)
            exists = column < V - block * block_v
        bias_v = None if bias is None else bias[:, slice_v]
        for part in parts:
            z_tv = lax.dot_general(
                rows[part.rows],
                head[slice_v],
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            part.reduce()
            part.follow(masked_logits(z_tv, bias_v, exists, options), first)
    for part in parts:
        if ends:
            part.reduce()
        else:
            logits[part.rows] = part.z_tv
        for n, name in enumerate(state_names(options)):
            states[n, part.rows] = part.state[name]


class _Part:
    """Some rows' running values, and the slice of logits that they lack."""

    def __init__(self, rows, targets, states, logits, tile_v, options: LogitOptions):
        """What the step before has left: a slice that ends where this tile starts."""
        self.rows = rows
        names = state_names(options)
        self.state = {name: states[n, rows] for n, name in enumerate(names)}
        shape = self.state["max"].shape
        # Where in the tile a lane has the row's target: compared with constants.
        lane = lax.broadcasted_iota(jnp.int32, shape, 1)
        self.target = jnp.broadcast_to(targets[rows], shape) - tile_v - lane
        self.top = self.state["max"]
        self.follow(logits[rows], -logits.shape[1])

    def follow(self, z_tv, first: int) -> None:
        """Takes a slice of logits to be reduced; `first` is its place in the tile."""
        self.z_tv, self.first = z_tv, first
        self.top = functools.reduce(jnp.maximum, self._groups(), self.top)

    def _groups(self):
        z_tv = self.z_tv
        return [z_tv[:, at : at + LANES] for at in range(0, z_tv.shape[1], LANES)]

    def reduce(self) -> None:
        """Adds the slice to the running values."""
        state = self.state
        drop = state["max"] - self.top
        factor = jnp.exp(drop)
        state["max"] = self.top
        if "sum_exp_diff" in state:
            # From differences to the old maximum to ones to the new. What the factor
            # makes 0 stays finite: 0 * -inf would be NaN.
            safe_drop = jnp.where(factor > 0, drop, 0.0)
            state["sum_exp_diff"] += state["sum_exp"] * safe_drop
        for name in ("sum_exp", "sum_exp_diff", "sum_exp2"):
            if name in state:
                state[name] *= factor * factor if name == "sum_exp2" else factor
        for n, z in enumerate(self._groups()):
            diff = z - self.top
            e = jnp.exp(diff)
            state["sum_exp"] += e
            hit = self.target == self.first + n * LANES
            state["target_logit"] = jnp.where(hit, z, state["target_logit"])
            if "sum_exp2" in state:
                state["sum_exp2"] += e * e
            # What is masked is -inf, and so is what the first step reduces: 0 * -inf
            # would be NaN.
            if "sum_exp_diff" in state:
                state["sum_exp_diff"] += e * jnp.maximum(diff, _LEAST)
            if "sum_logit" in state:
                state["sum_logit"] += jnp.where(z == -jnp.inf, 0.0, z)


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
