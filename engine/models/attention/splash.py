"""Attention on TPUs: the kernels that come with JAX (`splash_attention`).

They look at blocks of keys alone that causality or a window leaves visible; sequences
that share a row are told apart by segment ids.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jaxtyping import Array, Float

from engine.models.attention import untyped
from engine.parallel.batch import KeySpans

_LANES = 128  # blocks are multiples of it
UNIT = 512  # rows are padded to a multiple of it, shorter ones to one of _LANES
# At most, by `bench.tpu.splash_blocks`: what a block costs besides its products is that
# of a grid's step, so that large ones are faster, and skipped ones are not free either.
BLOCK = 1024  # queries, and keys, of a block
COMPUTE = 512  # of its keys, those whose scores are held at a time


def attend(
    query: Float[Array, "R S N H"],
    key: Float[Array, "R S K H"],
    value: Float[Array, "R S K H"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    spans: KeySpans | None = None,
    longest: int | None = None,
    sizes: kernels.BlockSizes | None = None,
    interpret: bool = False,
) -> Float[Array, "R S N H"]:
    """softmax(cap(scale * q . k)) v over the keys that each query sees.

    Scores and softmax are float32; queries are scaled in their own dtype.

    Args:
        window: how many tokens of its sequence a query sees, itself included; None: all
            up to it.
        spans: the keys of each query's sequence, of which none shares its beginning;
            None: all of its row up to it.
        longest: tokens that no sequence has more of: keys further away are skipped.
        sizes: of blocks that divide the padded row; None: `block_sizes`.
    """
    R, S, N, H = query.shape
    K = key.shape[2]
    unit = _LANES if S <= UNIT else UNIT
    length = -(-S // unit) * unit
    pad = ((0, 0), (0, length - S), (0, 0), (0, 0))

    def rows(x: Array) -> Array:
        """[R, K, .., length, H]"""
        x = jnp.pad(x, pad).reshape(R, length, K, -1, H)
        return x.transpose(0, 2, 3, 1, 4)

    segments = None
    if spans is not None:
        # What is behind the row comes after all that is in it: nobody sees it.
        edge = ((0, 0), (0, length - S))
        segments = jnp.pad(jnp.asarray(spans.begin), edge, mode="edge")
    reach = min(x for x in (window, longest, length) if x is not None)
    sizes = sizes or block_sizes(length, reach)
    kernel = kernel_of(length, N // K, reach, softcap, interpret, sizes)
    scaled = query * jnp.asarray(scale, query.dtype)
    out: Any = untyped.attention(
        kernel, None, rows(scaled), rows(key)[:, :, 0], rows(value)[:, :, 0], segments
    )
    return out.transpose(0, 3, 1, 2, 4).reshape(R, length, N, H)[:, :S]


def block_sizes(length: int, reach: int) -> kernels.BlockSizes:
    """The blocks of the kernels, for rows of so many tokens.

    reach: how many keys a query sees at most, itself included. Blocks that are larger
    would be mostly of keys that nobody sees.
    """
    block = _largest(length, min(BLOCK, max(reach, UNIT)))
    compute = _largest(block, COMPUTE)
    # One kernel for all gradients leaves as many parts of dq as there are blocks of
    # keys, rounded to its dtype; one part costs neither memory nor digits. In a block
    # of 1024 and heads of 256 it is too much for v5e.
    fused = block == length <= UNIT
    return kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )


def _largest(length: int, most: int) -> int:
    """The largest multiple of _LANES up to `most` that divides a length."""
    most -= most % _LANES
    return next(x for x in range(most, 0, -_LANES) if length % x == 0)


def mask_of(length: int, reach: int, group: int) -> Any:
    """What queries see, of as many heads as share a kv head.

    reach: how many keys a query sees at most, itself included.
    """
    shape = (length, length)
    mask: Any = masks.CausalMask(shape)
    if reach < length:
        mask = masks.LocalMask(shape, window_size=(reach - 1, 0), offset=0)
    return masks.MultiHeadMask([mask] * group)


@functools.cache
def kernel_of(
    length: int,
    group: int,
    reach: int,
    softcap: float | None,
    interpret: bool,
    sizes: kernels.BlockSizes,
) -> Any:
    """The call for kv heads, each with its group of query heads, in rows.

    Of query [R, K, group, length, H], key and value [R, K, length, H] and segment ids
    [R, length] or None.
    """
    mask = mask_of(length, reach, group)

    def attend(query: Array, key: Array, value: Array, segments: Any) -> Any:
        call = kernels.make_splash_mqa_single_device(
            mask=mask,
            block_sizes=sizes,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
        ids = None if segments is None else kernels.SegmentIds(segments, segments)
        return call(query, key, value, segment_ids=ids)

    over_heads = jax.vmap(attend, in_axes=(0, 0, 0, None))
    return jax.vmap(over_heads)
