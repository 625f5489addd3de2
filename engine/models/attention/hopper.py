"""Attention on NVIDIA's Hopper and Blackwell GPUs: the kernels of tokamax.

They are written in Pallas's Mosaic GPU dialect. Each query sees keys from one on up to
its own, and blocks that none of a block's queries sees are skipped; so sequences that
share a row, and windows, are where that begins.

Source: tokamax 0.0.17, `ops/attention`; its public function takes such ranges as a mask
of queries x keys alone, hence the private names.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from tokamax._src.ops.attention import (  # pyright: ignore[reportMissingImports]
    pallas_mosaic_gpu,
)
from tokamax._src.ops.attention.base import (  # pyright: ignore[reportMissingImports]
    DotProductAttention,
    Mask,
)

from engine.models.attention import untyped
from engine.parallel.batch import KeySpans


def attend(
    query: Float[Array, "R Q N H"],
    key: Float[Array, "R S K H"],
    value: Float[Array, "R S K H"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | Int[Array, ""] | None = None,
    spans: KeySpans | None = None,
    starts: Sequence[int | Int[Array, ""]] = (0,),
    device: Any = None,
    op: DotProductAttention | None = None,
) -> Float[Array, "R Q N H"]:
    """softmax(cap(scale * q . k)) v over the keys that each query sees.

    Scores and softmax are float32; queries, keys, values and what is between the
    products are bfloat16 or float16.

    Args:
        window: how many tokens of its sequence a query sees, itself included; None: all
            up to it.
        spans: the keys of each query's sequence, of which none shares its beginning;
            None: all of its row up to it.
        starts: queries are so many runs of a row, of equal lengths, which begin there
            in it; keys are whole rows.
        device: that this is for; None: JAX's default.
        op: in place of tokamax's own for such a device.
    """
    index = None
    if query.shape[1] != key.shape[1] or len(starts) > 1:
        within = jnp.arange(query.shape[1] // len(starts), dtype=jnp.int32)
        index = jnp.concatenate([start + within for start in starts])[None, None, :]
    first = first_seen(query.shape[1], window, spans, index)
    op = op or pallas_mosaic_gpu.PallasMosaicGpuFlashAttention()
    kernel = _kernel(op, scale, softcap)
    return untyped.attention(kernel, device, query, key, value, first, index)


def first_seen(
    length: int,
    window: int | Int[Array, ""] | None,
    spans: KeySpans | None,
    index: Int[Array, "1 1 S"] | None = None,
) -> Int[Array, "#R 1 S"] | None:
    """The first key that each query sees; None: its row's first one.

    index: of the queries in their row; None: in order, from its first one on.
    """
    first = None
    if spans is not None:
        first = jnp.asarray(spans.begin, jnp.int32)[:, None, :]
    if window is not None:
        if index is None:
            index = jnp.arange(length, dtype=jnp.int32)[None, None, :]
        near = index + 1 - window
        first = jnp.maximum(near, 0 if first is None else first)
    return first


@functools.cache
def _kernel(op: DotProductAttention, scale: float, softcap: float | None) -> Any:
    """The call of query, key, value, and of the first key and the last of each query.

    These may be None, where they are the row's first one, and the query's own.
    """

    def kernel(
        query: Array, key: Array, value: Array, first: Array | None, last: Array | None
    ) -> Array:
        mask = Mask(k_start=first, is_causal=True)
        if last is not None:
            mask = Mask(k_start=first, k_end=last + 1)
        return op(
            query, key, value, mask=mask, logits_scale=scale, logits_soft_cap=softcap
        )

    return kernel
