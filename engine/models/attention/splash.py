"""Attention on TPUs: the kernels that come with JAX (`splash_attention`).

They look at blocks of keys alone that causality, a window and other sequences leave
visible (`splash_grid`); within a block sequences are told apart by segment ids.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jaxtyping import Array, Float, Int

from engine.models.attention import untyped
from engine.models.attention.splash_grid import (
    LANES,
    UNIT,
    Causal,
    Queries,
    Rows,
    mask_info,
)
from engine.parallel.batch import KeySpans

# At most, by `bench.tpu.splash_blocks`: what a block costs besides its products is that
# of a grid's step, so that large ones are faster, and skipped ones are not free either.
BLOCK = 1024  # queries, and keys, of a block
COMPUTE = 512  # of its keys, those whose scores are held at a time


def attend(
    query: Float[Array, "R Q N H"],
    key: Float[Array, "R S K H"],
    value: Float[Array, "R S K H"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    spans: KeySpans | None = None,
    longest: int | None = None,
    starts: Sequence[int | Int[Array, ""]] = (0,),
    key_begin: Int[Array, "R S"] | None = None,
    sizes: kernels.BlockSizes | None = None,
    interpret: bool = False,
) -> Float[Array, "R Q N H"]:
    """softmax(cap(scale * q . k)) v over the keys that each query sees.

    Scores and softmax are float32; queries are scaled in their own dtype.

    Args:
        window: how many tokens of its sequence a query sees, itself included; None: all
            up to it.
        spans: the keys of each query's sequence, of which none shares its beginning;
            None: all of its row up to it.
        longest: tokens that no sequence has more of: keys further away are skipped.
        starts: queries are so many runs of a row, of equal lengths, which begin there
            in it; keys are whole rows.
        key_begin: where the sequences of keys begin; None: as those of queries.
        sizes: of blocks that divide the padded row; None: `block_sizes`.
    """
    R, S, K, H = key.shape
    group, runs = query.shape[2] // K, len(starts)
    fixed = all(isinstance(start, int) for start in starts)
    reach = min(x for x in (window, longest, S) if x is not None)
    rows = Rows.of(
        length=query.shape[1] // runs,
        keys=S,
        starts=tuple(starts) if fixed else None,
        runs=runs,
        reach=reach,
    )

    def padded(x: Array, runs: int, length: int) -> Array:
        """[R, K, .., runs * length, H]"""
        x = x.reshape(R, runs, -1, K, x.shape[2] // K, H)
        edge = (0, length - x.shape[2])
        x = jnp.pad(x, ((0, 0), (0, 0), edge, (0, 0), (0, 0), (0, 0)))
        return x.transpose(0, 3, 4, 1, 2, 5).reshape(R, K, -1, runs * length, H)

    begin = begin_of_keys = None
    if spans is not None:
        begin = jnp.asarray(spans.begin)
        begin_of_keys = begin if key_begin is None else key_begin
    kernel = Kernel(
        rows=rows,
        window=window if window is not None and window < S else None,
        softcap=softcap,
        sizes=sizes or block_sizes(rows.padded, rows.keys, reach),
        interpret=interpret,
    )
    out: Any = untyped.attention(
        kernel,
        None,
        padded(query * jnp.asarray(scale, query.dtype), runs, rows.padded),
        padded(key, 1, rows.keys)[:, :, 0],
        padded(value, 1, rows.keys)[:, :, 0],
        begin,
        begin_of_keys,
        None if fixed else jnp.stack(starts),
    )
    out = out.reshape(R, K, group, runs, rows.padded, H)[:, :, :, :, : rows.length]
    return out.transpose(0, 3, 4, 1, 2, 5).reshape(query.shape)


def block_sizes(queries: int, keys: int, reach: int) -> kernels.BlockSizes:
    """The blocks of the kernels, for runs of so many queries in rows of so many keys.

    reach: how many keys a query sees at most, itself included. Blocks that are larger
    would be mostly of keys that nobody sees.
    """
    most = min(BLOCK, max(reach, UNIT))
    block_q, block_kv = _largest(queries, most), _largest(keys, most)
    compute = _largest(block_kv, COMPUTE)
    # One kernel for all gradients leaves as many parts of dq as there are blocks of
    # keys, rounded to its dtype; one part costs neither memory nor digits. In a block
    # of 1024 and heads of 256 it is too much for v5e.
    fused = block_q == queries == block_kv == keys <= UNIT
    return kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=compute,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block_q,
        block_kv_dq=None if fused else block_kv,
        use_fused_bwd_kernel=fused,
    )


def _largest(length: int, most: int) -> int:
    """The largest multiple of LANES up to `most` that divides a length."""
    most -= most % LANES
    return next(x for x in range(most, 0, -LANES) if length % x == 0)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """The calls of the kernels for rows of kv heads, each with its query heads."""

    rows: Rows
    window: int | None  # None: it hides nothing of a query's sequence
    softcap: float | None
    sizes: kernels.BlockSizes
    interpret: bool = False

    def __call__(
        self,
        query: Float[Array, "R K G Q H"],
        key: Float[Array, "R K S H"],
        value: Float[Array, "R K S H"],
        begin: Int[Array, "R q"] | None = None,
        begin_of_keys: Int[Array, "R s"] | None = None,
        starts: Int[Array, " runs"] | None = None,
    ) -> Float[Array, "R K G Q H"]:
        """Attention of queries that are scaled, and whose runs are padded.

        Args:
            begin: where the sequences of queries begin; None: with their row.
            begin_of_keys: as well of keys.
            starts: of the runs, where they are known in the step.
        """
        forward, dq, dkv = self.mask_infos(self.rows.queries(begin, starts))
        call: Any = kernels.SplashAttentionKernel(
            forward,
            dq,
            dkv,
            block_sizes=self.sizes,
            is_mqa=True,
            save_residuals=False,
            mask_value=kernels.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=self.softcap,
            residual_checkpoint_name=None,
            mask_function=Causal(self.window),
            interpret=self.interpret,
        )

        def of_row(query: Array, key: Array, value: Array, segments: Any) -> Array:
            of_heads = functools.partial(call, segment_ids=segments)
            return jax.vmap(of_heads)(query, key, value)

        segments = None
        if begin is not None and begin_of_keys is not None:
            queries = self.rows.padded_runs(begin)
            more = self.rows.keys - begin_of_keys.shape[1]
            # Behind the last key nobody looks.
            keys = jnp.pad(begin_of_keys, ((0, 0), (0, more)))
            segments = kernels.SegmentIds(queries, keys)
        return jax.vmap(of_row)(query, key, value, segments)

    def mask_infos(self, queries: Queries) -> tuple[Any, Any, Any]:
        """What the kernels of the forward, of dq and of dk and dv go over."""

        def info(query: Any, keys: Any, *, by_keys: bool) -> Any:
            seen = queries.blocks(query, keys, self.rows.keys // keys)
            widths = self.rows.widths(query, keys)
            width, runs = widths.keys, 1
            if by_keys:
                width, runs = widths.queries, self.rows.runs
            return mask_info(seen, width, queries.number, by_keys=by_keys, runs=runs)

        sizes, dq = self.sizes, None
        forward = info(sizes.block_q, sizes.block_kv, by_keys=False)
        dkv = info(sizes.block_q_dkv, sizes.block_kv_dkv, by_keys=True)
        if not sizes.use_fused_bwd_kernel:
            dq = info(sizes.block_q_dq, sizes.block_kv_dq, by_keys=False)
        return forward, dq, dkv
