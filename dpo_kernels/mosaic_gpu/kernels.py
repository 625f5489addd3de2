"""What the Hopper kernels do with a tile of logits once it is in registers."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpo_kernels.mosaic_gpu.pipeline import (
    COLUMNS,
    ROWS,
    WARPGROUPS,
    logits_kernel,
    swizzled,
)
from dpo_kernels.op.gpu_tiling import MosaicTile
from dpo_kernels.op.interface import LogitOptions, Partials, kept_scale

_LOG2E = math.log2(math.e)
_STORE_SLOTS = 2  # pieces of a tile that can be on their way to memory
_NARROW, _WIDE = 32, 64  # vocabulary entries of a piece


def _rows_of(x: jax.Array, like: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(x, like.shape, (0,))


def _columns(like: jax.Array) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, like.shape, 1, layout=plgpu.Layout.WGMMA)


def _pieces(acc: jax.Array, column: Any, width: int) -> list[tuple[jax.Array, Any]]:
    """Slices of columns, each with its first vocabulary entry.

    Working on a few at a time keeps what is derived from them within the registers
    that the accumulator leaves.
    """
    starts = range(0, acc.shape[1], width)
    return [(acc[:, start : start + width], column + start) for start in starts]


def _unit(options: LogitOptions, bias_g: Any) -> float:
    """Of `_logits`, in nats: a scale alone goes into the factor that exp2 needs."""
    folded = options.softcap is None and bias_g is None and options.scale > 0
    return options.scale if folded else 1.0


def _logits(
    acc: jax.Array, column: Any, bias_g: Any, end: int | None, options: LogitOptions
) -> jax.Array:
    """Products as logits in units of `_unit`, -inf where the bias is or from `end` on.

    `bias_g` is padded with -inf. What an option would do costs nothing where it is off.
    """
    z = acc if _unit(options, bias_g) == options.scale else acc * options.scale
    bias = None
    if bias_g is not None:
        here = bias_g.at[pl.ds(column, acc.shape[1])]
        bias = plgpu.load(here, layout=COLUMNS, optimized=False)
        bias = lax.broadcast_in_dim(bias, acc.shape, (1,))
        z += bias
    if options.softcap is not None:
        # tanh from exp2, as the hardware's own is good to 11 bits only. Of -inf it is
        # -1: what does not exist is masked after the cap.
        z = jnp.exp2(z * (2 * _LOG2E / options.softcap))
        z = options.softcap - 2 * options.softcap / (z + 1.0)
        if bias is not None:
            z = jnp.where(bias == -jnp.inf, -jnp.inf, z)
    if bias is None and end is not None:
        z = jnp.where(_columns(acc) < end - column, z, -jnp.inf)
    return z


def _slope(z: jax.Array, softcap: float) -> jax.Array:
    """The soft-cap's derivative, from what it returned; 0 where nothing exists."""
    return jnp.where(z == -jnp.inf, 0.0, 1.0 - (z * (1 / softcap)) ** 2)


def _store_piece(piece: jax.Array, out_g: Any, row: Any, column: Any, at: Any) -> None:
    """Write part of a tile to memory while others are being computed.

    `at` is one of `_STORE_SLOTS` buffers, taken in turn.
    """
    plgpu.wait_smem_to_gmem(_STORE_SLOTS - 1, wait_read_only=True)
    at[...] = piece
    plgpu.commit_smem()
    here = pl.ds(row, piece.shape[0]), pl.ds(column, piece.shape[1])
    plgpu.copy_smem_to_gmem(at, out_g.at[here])


def _piece_width(most: int, out_v: int) -> int:
    """Entries of a piece: the copy engine needs them to divide a row of the output."""
    return next(width for width in (64, 32, 16) if width <= most and not out_v % width)


def _staging(tile: MosaicTile, dtype: Any, width: int) -> Any:
    shape = WARPGROUPS, _STORE_SLOTS, tile.block_t // WARPGROUPS, width
    return plgpu.SMEM(shape, dtype, transforms=swizzled(width, dtype))


def _load_rows(refs: Sequence[Any], row: Any, height: int) -> list[jax.Array]:
    rows = pl.ds(row, height)
    return [plgpu.load(x.at[rows], layout=ROWS, optimized=False) for x in refs]


def partial_fields(options: LogitOptions) -> tuple[str, ...]:
    """The fields of `Partials` that the forward kernel writes, in this order."""
    stats = {"entropy": "sum_exp_z", "collision": "sum_exp2", "mean_logit": "sum_logit"}
    asked = (field for stat, field in stats.items() if stat in options.stats)
    return ("max", "sum_exp", "target_logit", *asked)


def _folded(combine: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """The fewest columns that registers can hold, of as many values to be combined.

    No more work than to combine whole pieces, and a fraction of the registers.
    """
    return functools.reduce(combine, [x[:, i : i + 8] for i in range(0, x.shape[1], 8)])


def _reduce(
    logits: Sequence[tuple[jax.Array, Any]],
    target: jax.Array,
    masked: bool,
    unit: float,
    fields: Sequence[str],
    keep: Callable[[int, jax.Array, jax.Array, Any], None],
) -> list[jax.Array]:
    """A tile's partials, one for each of `fields`.

    `keep` is called with each piece's number, exponentials, logits and column.
    """
    tops = [_folded(jnp.maximum, z) for z, _ in logits]
    top = functools.reduce(jnp.maximum, tops).max(axis=1)
    # -inf - -inf would be NaN where nothing of the tile exists.
    shift = jnp.where(top == -jnp.inf, 0.0, top) if masked else top
    sums: dict[str, jax.Array] = {}

    def add(field: str, x: jax.Array) -> None:
        x = _folded(jnp.add, x)
        sums[field] = sums[field] + x if field in sums else x

    at_target = jnp.float32(-jnp.inf)
    for i, (z, column) in enumerate(logits):
        e = jnp.exp2(z * (unit * _LOG2E) - _rows_of(shift * (unit * _LOG2E), z))
        add("sum_exp", e)
        keep(i, e, z, column)
        hit = _columns(z) == _rows_of(target - column, z)
        found_here = _folded(jnp.maximum, jnp.where(hit, z, -jnp.inf))
        at_target = jnp.maximum(at_target, found_here)
        finite = jnp.where(z == -jnp.inf, 0.0, z) if masked else z
        if "sum_exp_z" in fields:
            add("sum_exp_z", e * finite)
        if "sum_exp2" in fields:
            add("sum_exp2", e * e)
        if "sum_logit" in fields:
            add("sum_logit", finite)
    found = {name: total.sum(axis=1) for name, total in sums.items()}
    found["max"] = top
    found["target_logit"] = at_target.max(axis=1)
    in_units = ("max", "target_logit", "sum_exp_z", "sum_logit")
    return [found[name] * unit if name in in_units else found[name] for name in fields]


def forward(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    bias: jax.Array | None,
    num_valid: jax.Array,
    *,
    options: LogitOptions,
    keep_v: int,
    tile: MosaicTile,
    num_cores: int,
) -> tuple[Partials, jax.Array | None]:
    """Partials [blocks, rows] with block_v entries a block, and [T, keep_v].

    16 divides `keep_v`; `targets` and `bias` are padded to whole tiles of a cluster,
    with -1 and -inf.
    """
    V, height = head.shape[0], tile.block_t // WARPGROUPS
    fields, ragged = partial_fields(options), V % tile.block_v != 0
    width = _piece_width(_NARROW, keep_v)

    def begin(row: Any, targets_g: Any, *_: Any) -> list[jax.Array]:
        return _load_rows([targets_g], row, height)

    def finish(acc, row, column, state, extra, outs, scratch):
        bias_g = extra[1] if bias is not None else None
        staged, *kept_staging = scratch

        def keep(i: int, e: jax.Array, z: jax.Array, column: Any) -> None:
            @pl.when(column < keep_v)
            def _():
                kept = e if options.softcap is None else e * _slope(z, options.softcap)
                if kept_scale(hidden.dtype) != 1:
                    kept *= kept_scale(hidden.dtype)
                at = kept_staging[0].at[i % _STORE_SLOTS]
                _store_piece(kept.astype(hidden.dtype), outs[-1], row, column, at)

        logits = [
            (_logits(x, at, bias_g, V if ragged else None, options), at)
            for x, at in _pieces(acc, column, width)
        ]
        found = _reduce(
            logits,
            state[0],
            masked=ragged or bias is not None,
            unit=_unit(options, bias_g),
            fields=fields,
            keep=keep if keep_v else lambda *_: None,
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, values in enumerate(found):
            staged[i] = values
        plgpu.commit_smem()
        here = lax.div(column, jnp.int32(tile.block_v)), pl.ds(row, height)
        for i, out_g in enumerate(outs[: len(found)]):
            plgpu.copy_smem_to_gmem(staged.at[i], out_g.at[here])

    blocks = pl.cdiv(V, tile.block_v)
    field_type = jax.ShapeDtypeStruct((blocks, targets.shape[0]), jnp.float32)
    out_type, scratch = [field_type] * len(fields), []
    scratch.append(plgpu.SMEM((WARPGROUPS, len(fields), height), jnp.float32))
    if keep_v:
        out_type.append(jax.ShapeDtypeStruct((hidden.shape[0], keep_v), hidden.dtype))
        scratch.append(_staging(tile, hidden.dtype, width))
    outs = logits_kernel(
        begin,
        finish,
        tile=tile,
        num_cores=num_cores,
        operands=[hidden, head, num_valid, targets] + ([] if bias is None else [bias]),
        out_type=out_type,
        scratch=scratch,
        name="token_logprobs_forward",
    )
    partials = Partials(**dict(zip(fields, outs, strict=False)))
    return partials, outs[-1] if keep_v else None


def dlogits(
    hidden: jax.Array,
    head: jax.Array,
    rows: Sequence[jax.Array],
    bias: jax.Array | None,
    num_valid: jax.Array,
    *,
    options: LogitOptions,
    tile: MosaicTile,
    num_cores: int,
) -> jax.Array:
    """[T, chunk], as wide as the next multiple of 16.

    `rows` are targets, lse, p_coef and target_grad, padded to whole tiles of a cluster
    with -1, inf, 0 and 0.
    """
    T, V, height = hidden.shape[0], head.shape[0], tile.block_t // WARPGROUPS
    out_v = pl.cdiv(V, 16) * 16

    def begin(row: Any, *refs: Any) -> list[jax.Array]:
        return _load_rows(refs[:4], row, height)

    def finish(acc, row, column, state, extra, outs, scratch):
        target, lse, p_coef, target_grad = state
        bias_g = extra[4] if bias is not None else None
        to_log2 = _unit(options, bias_g) * _LOG2E
        for i, (x, at) in enumerate(_pieces(acc, column, width)):
            # No `end`: what lies past it is not written.
            z = _logits(x, at, bias_g, None, options)
            hit = _columns(z) == _rows_of(target - at, z)
            p = jnp.exp2(z * to_log2 - _rows_of(lse * _LOG2E, z))
            dx = jnp.where(hit, _rows_of(target_grad, z), _rows_of(p_coef, z) * p)
            if options.softcap is not None:
                dx *= _slope(z, options.softcap)
            if bias is not None:
                dx = jnp.where(z == -jnp.inf, 0.0, dx)
            staged = scratch[0].at[i % _STORE_SLOTS]
            _store_piece(dx.astype(hidden.dtype), outs[0], row, at, staged)

    width = _piece_width(_WIDE if bias is None else _NARROW, out_v)
    (dx,) = logits_kernel(
        begin,
        finish,
        tile=tile,
        num_cores=num_cores,
        operands=[hidden, head, num_valid, *rows] + ([] if bias is None else [bias]),
        out_type=[jax.ShapeDtypeStruct((T, out_v), hidden.dtype)],
        scratch=[_staging(tile, hidden.dtype, width)],
        name="token_logprobs_dlogits",
    )
    return dx
