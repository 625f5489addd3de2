"""The kernels of `sums_mosaic_gpu`; loads Mosaic GPU, so imported only to launch them.

Mosaic has no masked loads and stores. In the forward a block that would end past the
arrays is moved back to end there, and what is not its own in it is masked in registers.
In the backward a block owns its tokens, whatever sequences they are of.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from dpo_kernels.mosaic_gpu import axes

WARPGROUP = 128  # threads; a block of tokens is a multiple of it
VECTOR = 4  # tokens in one load of a thread, which starts at a multiple of it


def _layout(block: int) -> Any:
    vector = min(VECTOR, block // WARPGROUP)
    return plgpu.Layout.WG_STRIDED((block,), vec_size=vector)


def _zeros(block: int) -> Array:
    return plgpu.layout_cast(jnp.zeros((block,), jnp.float32), _layout(block))


def _tokens(start: Any, block: int) -> Array:
    layout = _layout(block)
    return start + plgpu.broadcasted_iota(jnp.int32, (block,), 0, layout=layout)


def _load(ref: Any, start: Any, block: int) -> Array:
    x = plgpu.load(ref.at[pl.ds(start, block)], layout=_layout(block))
    return x.astype(jnp.float32)


def sums_kernel(T: int, block: int, *refs: Any) -> None:
    """One sequence; its lanes add what they hold of each block, then one another.

    Refs: values, weights if there are any, offsets; sums, counts.
    """
    values, *weights, offsets, sums, counts = refs
    capacity = values.shape[0]
    r = lax.axis_index(axes.SEQUENCE)
    first = jnp.clip(offsets[r], 0, T)
    last = jnp.clip(offsets[r + 1], 0, T)
    origin = first // VECTOR * VECTOR

    def add(i: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        start = origin + i * block
        at = jnp.minimum(start, capacity - block)
        token = _tokens(at, block)
        # max: what is before `start` is of another sequence, or has been added.
        counted = (token >= jnp.maximum(first, start)) & (token < last)
        term = _load(values, at, block)
        if weights:
            weight = _load(weights[0], at, block)
            counted &= weight != 0.0
            term *= weight
        # Masked after the product, which may be NaN where the weight is 0.
        sum_t, count_t = carry
        sum_t += jnp.where(counted, term, 0.0)
        return sum_t, count_t + counted.astype(jnp.float32)

    blocks = (last - origin + (block - 1)) // block
    carry = (_zeros(block), _zeros(block))
    sum_t, count_t = lax.fori_loop(0, blocks, add, carry)
    sums[r] = jnp.sum(sum_t)
    counts[r] = jnp.sum(count_t)


def _first_sequence(offsets: Any, R: int, token: Any) -> Array:
    """The first sequence that ends after `token`; R if there is none."""

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = jnp.minimum((low + high) // 2, R - 1)
        before = offsets[middle + 1] <= token
        return jnp.where(before, middle + 1, low), jnp.where(before, high, middle)

    bounds = (jnp.int32(0), jnp.int32(R))
    return lax.fori_loop(0, R.bit_length(), halve, bounds)[0]


def gradient_kernel(
    block: int, weighted: bool, want_dweights: bool, *refs: Any
) -> None:
    """One block of tokens, and the sequences that it meets one after another.

    Refs: values if the weights' gradient is wanted, weights if there are any, offsets,
    dsums; dvalues, dweights if wanted.
    """
    value_refs, refs = refs[:want_dweights], refs[want_dweights:]
    weight_refs, refs = refs[:weighted], refs[weighted:]
    offsets, dsums, dvalues, *dweights = refs
    R = dsums.shape[0]
    start = lax.axis_index(axes.TOKENS) * block
    token = _tokens(start, block)
    first = _first_sequence(offsets, R, start)

    def meets_block(carry: tuple[Array, Array, Array]) -> Array:
        r, begin, _ = carry
        return (r < R) & (begin < start + block)

    def take(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        r, begin, dsum_t = carry
        end = offsets[r + 1]
        inside = (token >= begin) & (token < end)
        return r + 1, end, jnp.where(inside, dsums[r], dsum_t)

    carry = (first, offsets[first], _zeros(block))
    _, _, dsum_t = lax.while_loop(meets_block, take, carry)
    at = pl.ds(start, block)
    if not weighted:
        dvalues[at] = dsum_t.astype(dvalues.dtype)
        return
    weight = _load(weight_refs[0], start, block)
    # Masked after the product, which may be NaN in tokens that are not counted.
    counted = (token >= offsets[0]) & (token < offsets[R]) & (weight != 0.0)
    grad = jnp.where(counted, weight * dsum_t, 0.0)
    dvalues[at] = grad.astype(dvalues.dtype)
    if want_dweights:
        value = _load(value_refs[0], start, block)
        grad = jnp.where(counted, value * dsum_t, 0.0)
        dweights[0][at] = grad.astype(dweights[0].dtype)
