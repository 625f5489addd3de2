"""The epilogues of the Hopper kernels: what becomes of a tile of products."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from dpo_kernels.mosaic_gpu.logits import (
    LOG2E,
    STORE_SLOTS,
    columns,
    load_rows,
    piece_width,
    pieces_of,
    rows_of,
    slope,
    staging,
    store_piece,
    to_logits,
    unit_of,
)
from dpo_kernels.mosaic_gpu.pipeline import WARPGROUPS, Refs, logits_kernel
from dpo_kernels.op.gpu_tiling import MosaicTile
from dpo_kernels.op.interface import LogitOptions, Partials, kept_scale

_NARROW, _WIDE = 32, 64  # vocabulary entries of a piece
_LOWEST = float(jnp.finfo(jnp.float32).min)


def partial_fields(options: LogitOptions) -> tuple[str, ...]:
    """The fields of `Partials` that the forward kernel writes, in this order."""
    stats = dict(entropy="sum_exp_diff", collision="sum_exp2", mean_logit="sum_logit")
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
        # The difference first, which is exact near the maximum. The cheaper
        # multiply-add z * log2e - shift * log2e has the rounding of shift * log2e.
        diff = z - rows_of(shift, z)
        e = jnp.exp2(diff * (unit * LOG2E))
        add("sum_exp", e)
        hit = columns(z) == rows_of(target - column, z)
        found_here = _folded(jnp.maximum, jnp.where(hit, z, -jnp.inf))
        at_target = jnp.maximum(at_target, found_here)
        if "sum_exp_diff" in fields:
            # e * diff is 0 * -inf, a NaN, where nothing exists. Asking z for it instead
            # keeps more alive: with a bias the kernel spilled.
            finite = jnp.maximum(diff, _LOWEST) if masked else diff
            add("sum_exp_diff", e * finite)
        if "sum_exp2" in fields:
            add("sum_exp2", e * e)
        if "sum_logit" in fields:
            add("sum_logit", jnp.where(z == -jnp.inf, 0.0, z) if masked else z)
        # Last, as it branches: sums behind it have z, diff and e live across it. The
        # assembler puts sums off while it has registers, and one was too many.
        keep(i, e, z, column)
    found = {name: total.sum(axis=1) for name, total in sums.items()}
    found["max"] = top
    found["target_logit"] = at_target.max(axis=1)
    in_units = ("max", "target_logit", "sum_exp_diff", "sum_logit")
    return [found[name] * unit if name in in_units else found[name] for name in fields]


@dataclass(frozen=True, kw_only=True)
class ForwardEpilogue:
    """A tile's partials, and the exponentials of its leading entries to be kept.

    Operands: `targets` int32 [rows] and perhaps `bias` float32 [columns], padded to
    whole tiles of a cluster with -1 and -inf. Outputs: the fields of `Partials`
    [blocks, rows], a block being a tile's entries, and perhaps `kept` [T, keep_v].
    """

    operands: dict[str, jax.Array]
    options: LogitOptions
    dtype: Any
    T: int
    V: int
    keep_v: int  # 16 divides it
    tile: MosaicTile
    name: str = "token_logprobs_forward"

    @property
    def fields(self) -> tuple[str, ...]:
        """Of `Partials`."""
        return partial_fields(self.options)

    @property
    def outputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `Epilogue`."""
        shape = pl.cdiv(self.V, self.tile.block_v), self.operands["targets"].shape[0]
        found = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in self.fields}
        if self.keep_v:
            shape = self.T, self.keep_v
            found["kept"] = jax.ShapeDtypeStruct(shape, self.dtype)
        return found

    @property
    def width(self) -> int:
        """Vocabulary entries of a piece."""
        return piece_width(_NARROW, self.keep_v)

    @property
    def scratch(self) -> dict[str, Any]:
        """See `Epilogue`."""
        if not self.keep_v:
            return {}
        return {"kept_pieces": staging(self.tile, self.dtype, self.width)}

    def prefetch(self, refs: Refs, row: Any) -> jax.Array:
        """The targets."""
        height = self.tile.block_t // WARPGROUPS
        return load_rows([refs["targets"]], row, height)[0]

    def __call__(
        self, refs: Refs, acc: jax.Array, row: Any, column: Any, fetched: jax.Array
    ) -> None:
        """See `Epilogue`."""
        options, bias_g = self.options, refs.get("bias")
        ragged = self.V % self.tile.block_v != 0
        end = self.V if ragged else None
        logits = [
            (to_logits(x, at, bias_g, end, options), at)
            for x, at in pieces_of(acc, column, self.width)
        ]
        found = _reduce(
            logits,
            fetched,
            masked=ragged or bias_g is not None,
            unit=unit_of(options, bias_g),
            fields=self.fields,
            keep=functools.partial(self._keep, refs, row) if self.keep_v else _drop,
        )
        here = lax.div(column, jnp.int32(self.tile.block_v))
        for name, values in zip(self.fields, found, strict=True):
            # Of four lanes that hold a row's value each writes it. Through shared
            # memory it would take a barrier before and after every field.
            refs[name][here, pl.ds(row, values.shape[0])] = values

    def _keep(
        self, refs: Refs, row: Any, i: int, e: jax.Array, z: jax.Array, column: Any
    ) -> None:
        """The i-th piece of a tile, from `column` on."""
        softcap, scale = self.options.softcap, kept_scale(self.dtype)

        @pl.when(column < self.keep_v)
        def _():
            kept = e if softcap is None else e * slope(z, softcap)
            if scale != 1:
                kept *= scale
            at = refs["kept_pieces"].at[i % STORE_SLOTS]
            store_piece(kept.astype(self.dtype), refs["kept"], row, column, at)


def _drop(*_: Any) -> None:
    """Keep nothing."""


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
    """Partials [blocks, rows] and [T, keep_v]: see `ForwardEpilogue`."""
    epilogue = ForwardEpilogue(
        operands={"targets": targets} | ({} if bias is None else {"bias": bias}),
        options=options,
        dtype=hidden.dtype,
        T=hidden.shape[0],
        V=head.shape[0],
        keep_v=keep_v,
        tile=tile,
    )
    found = logits_kernel(
        epilogue, hidden, head, num_valid, tile=tile, num_cores=num_cores
    )
    kept = found.pop("kept", None)
    return Partials(**found), kept


@dataclass(frozen=True, kw_only=True)
class DlogitsEpilogue:
    """A tile of the logits' gradient.

    Operands: those of ROW_OPERANDS [rows], padded to whole tiles of a cluster with
    ROW_FILLS, and perhaps `bias`, padded with -inf. Output: `dlogits` [T, out_v].
    """

    operands: dict[str, jax.Array]
    options: LogitOptions
    dtype: Any
    T: int
    out_v: int  # 16 divides it
    tile: MosaicTile
    name: str = "token_logprobs_dlogits"

    @property
    def outputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `Epilogue`."""
        return {"dlogits": jax.ShapeDtypeStruct((self.T, self.out_v), self.dtype)}

    @property
    def width(self) -> int:
        """Vocabulary entries of a piece; a bias takes registers."""
        most = _NARROW if "bias" in self.operands else _WIDE
        return piece_width(most, self.out_v)

    @property
    def scratch(self) -> dict[str, Any]:
        """See `Epilogue`."""
        return {"pieces": staging(self.tile, self.dtype, self.width)}

    def prefetch(self, refs: Refs, row: Any) -> list[jax.Array]:
        """The rows' operands."""
        height = self.tile.block_t // WARPGROUPS
        return load_rows([refs[name] for name in ROW_OPERANDS], row, height)

    def __call__(
        self,
        refs: Refs,
        acc: jax.Array,
        row: Any,
        column: Any,
        fetched: list[jax.Array],
    ) -> None:
        """See `Epilogue`."""
        target, shift, p_coef, target_grad = fetched
        options, bias_g = self.options, refs.get("bias")
        unit = unit_of(options, bias_g)
        for i, (x, at) in enumerate(pieces_of(acc, column, self.width)):
            # No `end`: what lies past it is not written.
            z = to_logits(x, at, bias_g, None, options)
            hit = columns(z) == rows_of(target - at, z)
            diff = z - rows_of(shift * (1 / unit), z)
            e = jnp.exp2(diff * (unit * LOG2E))
            dx = jnp.where(hit, rows_of(target_grad, z), rows_of(p_coef, z) * e)
            if options.softcap is not None:
                dx *= slope(z, options.softcap)
            if bias_g is not None:
                dx = jnp.where(z == -jnp.inf, 0.0, dx)
            staged = refs["pieces"].at[i % STORE_SLOTS]
            store_piece(dx.astype(self.dtype), refs["dlogits"], row, at, staged)


# What the gradient of a logit needs of its row, and what stands for it in padding.
ROW_OPERANDS = ("targets", "shift", "p_coef", "target_grad")
ROW_FILLS = (-1, jnp.inf, 0, 0)


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
    """[T, chunk], as wide as the next multiple of 16; `rows` are ROW_OPERANDS."""
    operands = dict(zip(ROW_OPERANDS, rows, strict=True))
    epilogue = DlogitsEpilogue(
        operands=operands | ({} if bias is None else {"bias": bias}),
        options=options,
        dtype=hidden.dtype,
        T=hidden.shape[0],
        out_v=pl.cdiv(head.shape[0], 16) * 16,
        tile=tile,
    )
    found = logits_kernel(
        epilogue, hidden, head, num_valid, tile=tile, num_cores=num_cores
    )
    return found["dlogits"]
