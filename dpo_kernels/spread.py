"""The op of rows that are spread over the devices which the vocabulary is split over.

Every device needs all rows, to multiply them with its slice of the head. They are
gathered a block at a time, forwards and again backwards, so that no device ever holds
the hidden states of all, or their gradients. Letters: N devices, T rows on each, of
which t are in a block; D hidden, V vocabulary (this device's slice of it).
"""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int, Shaped

from dpo_kernels.op.blocks import (
    block_sizes,
    compact_index,
    in_blocks,
    out_of_blocks,
    row_slots,
)
from dpo_kernels.op.checks import check_arguments, check_vocab_parallel
from dpo_kernels.op.interface import TokenLogprobs, accumulator
from dpo_kernels.op.loops import make_varying, varying_axes
from dpo_kernels.op.rule import (
    AxisName,
    Static,
    axis_tuple,
    forward,
    make_static,
    unwrapped,
    vjp_backward,
    vjp_forward,
)
from dpo_kernels.op.tiling import problem_of

_LEAST_ROWS = 16384  # of a block, below which products are of an awkward shape


def spread_token_logprobs(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " T"],
    *,
    axis_name: AxisName,
    rows_axis: AxisName,
    num_valid: Int[Array, ""] | int | None = None,
    bias: Float[Array, " V"] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    stats: tuple[str, ...] = (),
    workspace_bytes: int = 256 * 2**20,
    block_rows: int | None = None,
    implementation: str = "auto",
) -> TokenLogprobs:
    """`token_logprobs` of this device's rows, by all devices that have vocabulary.

    Inside `shard_map`. As `token_logprobs` of the gathered rows, but that these are
    gathered a block at a time. The padding of a block is at its end: no work is done
    for rows that are not valid, on whichever device they are.

    Args:
        hidden: this device's rows; as many on each device.
        targets: of these, ids in the whole vocabulary.
        axis_name: the mesh axes that `head` and `bias` are split over.
        rows_axis: those of them that the rows are spread over.
        num_valid: of this device; rows at and after it are padding.
        block_rows: how many are gathered at a time, about; None: twice as many as this
            device has of the vocabulary, so that the float32 gradient of a block takes
            twice what that of the head takes, and 16,384 at least. With several blocks
            exponentials are not kept, and the gradient of `head` is added up over them
            in float32.
        workspace_bytes: as there, for a block.
    Returns:
        Those of this device's rows.
    Raises:
        ValueError: as `token_logprobs` does, and where rows are spread over other axes
            than the vocabulary.
    """
    rows_axes, vocab_axes = (frozenset(axis_tuple(x)) for x in (rows_axis, axis_name))
    if not rows_axes <= vocab_axes:
        raise ValueError(
            f"{rows_axis=} must be among {axis_name=}: rows that are spread over other "
            "axes need not be gathered, as each device has what it multiplies them with"
        )
    stats = tuple(stats)
    check_arguments(hidden, head, targets, num_valid, bias, softcap, stats)
    T, devices = hidden.shape[0], lax.axis_size(rows_axis)
    blocks, size = blocks_of(T, devices, head.shape[0], block_rows)
    valid = jnp.int32(T) if num_valid is None else jnp.asarray(num_valid, jnp.int32)
    valid, targets = (make_varying(x, rows_axes) for x in (valid, targets))
    counts_N = lax.all_gather(valid, rows_axis, to="invarying")
    targets_NT = lax.all_gather(targets, rows_axis, to="invarying")
    first_B = jnp.arange(blocks, dtype=jnp.int32) * size
    numbers = _Numbers(
        counts=jnp.clip(counts_N[None] - first_B[:, None], 0, size),
        targets=in_blocks(targets_NT, 1, blocks, size),
    )
    problem = problem_of(hidden, head, valid, workspace_bytes)
    static = make_static(
        replace(problem, T=devices * size),
        softcap=softcap,
        scale=scale,
        axis_name=axis_name,
        stats=stats,
        implementation=implementation,
    )
    check_vocab_parallel(head, targets_NT, axis_name)
    axes = varying_axes(hidden, head, targets, bias, valid)
    hidden = make_varying(hidden, axes - (vocab_axes - rows_axes))
    head = make_varying(head, axes)
    bias = None if bias is None else make_varying(bias, axes)
    spread = _Spread(static, rows_axis, blocks, size)
    results: tuple[Array, ...] = _spread_logprobs(spread, hidden, head, bias, numbers)
    logprob, lse, *stat_values = (x[:T] for x in results)
    named = dict(zip(stats, map(lax.stop_gradient, stat_values), strict=True))
    return TokenLogprobs(logprob=logprob, lse=lse, **named)


def blocks_of(
    T: int, devices: int, V: int, block_rows: int | None = None
) -> tuple[int, int]:
    """How many blocks T rows of each device are gathered in, and how many of its rows.

    Of so many devices which have V entries of the vocabulary each.
    """
    rows = block_rows or max(_LEAST_ROWS, 2 * V)
    return block_sizes(T, max(1, -(-devices * T // rows)))


class _Numbers(NamedTuple):
    """Of all devices, block by block; the same on each."""

    counts: Int[Array, "B N"]  # valid rows
    targets: Int[Array, "B N t"]


class _Spread(NamedTuple):
    """What is not traced."""

    static: Static
    axis: AxisName
    blocks: int
    size: int  # t

    def cut(self, rows: Array) -> Array:
        """A device's rows [T, ...] in blocks [B, t, ...]."""
        return in_blocks(rows, 0, self.blocks, self.size)

    def gathered(self, hidden: Float[Array, "t D"], numbers: _Numbers) -> Any:
        """A block's rows of all devices and their targets, valid ones first.

        Before these, of what is in the order of devices the index that makes it so;
        behind them, how many are valid.
        """
        order, total = compact_index(numbers.counts, self.size)
        targets = numbers.targets.reshape(-1)
        if numbers.counts.shape[0] == 1:
            return order, hidden, targets, total
        rows = lax.all_gather(hidden, self.axis, tiled=True)
        return order, rows[order], targets[order], total

    def own(self, values: Shaped[Array, " Nt"], numbers: _Numbers) -> Array:
        """Of values in that order, those of this device's rows."""
        slots, valid = row_slots(numbers.counts, self.size)
        here = lax.axis_index(self.axis)
        return jnp.where(valid[here], values[slots[here]], jnp.zeros((), values.dtype))

    def of_all(self, own: Float[Array, " t"], order: Int[Array, " Nt"]) -> Array:
        """Of values of this device's rows, those of all, in that order."""
        return lax.all_gather(own, self.axis, tiled=True, to="invarying")[order]

    def scattered(self, rows: Float[Array, "Nt D"], numbers: _Numbers) -> Array:
        """Of each device's share of rows in that order, the sum of this one's rows."""
        if numbers.counts.shape[0] > 1:
            slots, valid = row_slots(numbers.counts, self.size)
            rows = rows[slots.reshape(-1)]
            rows = jnp.where(valid.reshape(-1, 1), rows, jnp.zeros((), rows.dtype))
        return lax.psum_scatter(rows, self.axis, scatter_dimension=0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _spread_logprobs(spread: _Spread, hidden, head, bias, numbers):
    def one(own: Array, numbers: _Numbers) -> Any:
        _, rows, targets, total = spread.gathered(own, numbers)
        found = forward(spread.static, 0, rows, head, bias, targets, total)
        return tuple(spread.own(x, numbers) for x in found.results)

    return _joined(_each_block(spread, one, (spread.cut(hidden), numbers)))


def _forward(spread: _Spread, *primals):
    (hidden, head, bias, numbers), wanted = unwrapped(*primals)

    def one(own: Array, numbers: _Numbers) -> Any:
        _, rows, targets, total = spread.gathered(own, numbers)
        values = rows, head, bias, targets, total
        results, (_, saved_rows, kept, _) = vjp_forward(
            spread.static, wanted, values, keep=spread.blocks == 1
        )
        return tuple(spread.own(x, numbers) for x in results), (saved_rows, kept)

    results, saved = _each_block(spread, one, (spread.cut(hidden), numbers))
    return _joined(results), (hidden, head, bias, numbers, wanted, saved)


def _backward(spread: _Spread, saved, cotangents):
    hidden, head, bias, numbers, wanted, saved_blocks = saved
    acc = accumulator(head.dtype)
    cotangents = tuple(
        None if isinstance(ct, SymbolicZero) else spread.cut(ct)
        for ct in cotangents[:2]
    )

    def one(total: Any, block: Any) -> Any:
        own, numbers, cotangents, (saved_rows, kept) = block
        order, rows, targets, num_valid = spread.gathered(own, numbers)
        zeros = jnp.zeros_like(saved_rows[0])
        cotangents = [
            zeros if ct is None else spread.of_all(ct, order) for ct in cotangents
        ]
        values = rows, head, bias, targets, num_valid
        drows, *rest, _, _ = vjp_backward(
            spread.static, (values, saved_rows, kept, wanted), cotangents
        )
        dhidden = None if drows is None else spread.scattered(drows, numbers)
        if total is None:
            return rest, dhidden
        added = jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, tuple(rest))
        return added, dhidden

    blocks = spread.cut(hidden), numbers, cotangents
    if spread.blocks == 1:
        (dhead, dbias), dhidden = one(None, (*_first(blocks), saved_blocks))
        return dhidden, dhead, dbias, None
    axes = varying_axes(head)
    zeros = (
        None if wanted.head is None else jnp.zeros(head.shape, acc),
        None if wanted.bias is None else jnp.zeros(head.shape[:1], acc),
    )
    zeros = jax.tree.map(lambda x: make_varying(x, axes), zeros)
    (dhead, dbias), dhidden = lax.scan(one, zeros, (*blocks, saved_blocks))
    dhead = None if dhead is None else dhead.astype(head.dtype)
    dbias = None if dbias is None else dbias.astype(bias.dtype)
    if dhidden is not None:
        dhidden = out_of_blocks(dhidden, 0, hidden.shape[0])
    return dhidden, dhead, dbias, None


def _each_block(spread: _Spread, function: Any, blocks: Any) -> Any:
    """`function` of each of the blocks, its results stacked; of a single one as is."""
    if spread.blocks == 1:
        return function(*_first(blocks))
    return lax.map(lambda block: function(*block), blocks)


def _first(blocks: Any) -> Any:
    return jax.tree.map(lambda x: x[0], blocks)


def _joined(results: Any) -> Any:
    return tuple(x.reshape(-1) for x in results)


_spread_logprobs.defvjp(_forward, _backward, symbolic_zeros=True)
