"""The kernels of `sums_triton`; loads Triton, so imported only to launch them.

Constants are in capitals; what an option switches off is not compiled. A pointer to an
argument that is absent is never followed.
"""

from typing import no_type_check

import triton
import triton.language as tl

_VECTOR = tl.constexpr(16)  # a block starts at a multiple: its loads are then vectors


@triton.jit
@no_type_check
def sums_kernel(
    values,
    weights,
    offsets,
    sums,
    counts,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """One sequence; its lanes add what they hold of each block, then one another."""
    r = tl.program_id(0)
    first = tl.maximum(tl.load(offsets + r), 0)
    last = tl.minimum(tl.load(offsets + r + 1), T)
    end = (last + _VECTOR - 1) // _VECTOR * _VECTOR
    sum_t = tl.zeros((BLOCK,), tl.float32)
    count_t = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(first // _VECTOR * _VECTOR, last, BLOCK):
        token = start + tl.arange(0, BLOCK)
        # Of whole vectors where _VECTOR divides T: neighbours' tokens are read, too.
        readable = (token < end) & (token < T)
        counted = (token >= first) & (token < last)
        term = tl.load(values + token, mask=readable, other=0.0).to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weights + token, mask=readable, other=0.0).to(tl.float32)
            counted &= weight != 0.0
            term *= weight
        # Masked after the product, which may be NaN where the weight is 0.
        sum_t += tl.where(counted, term, 0.0)
        count_t += tl.where(counted, 1.0, 0.0)
    tl.store(sums + r, tl.sum(sum_t, axis=0))
    tl.store(counts + r, tl.sum(count_t, axis=0))


@triton.jit
@no_type_check
def gradient_kernel(
    values,
    weights,
    offsets,
    dsums,
    dvalues,
    dweights,
    T: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WANT_DWEIGHTS: tl.constexpr,
):
    """One block of tokens, and the sequences that it meets one after another."""
    start = tl.program_id(0) * BLOCK
    token = start + tl.arange(0, BLOCK)
    # The first sequence that ends after `start`: as many as end before.
    r = tl.full((), 0, tl.int32)
    for start_r in tl.range(0, R, BLOCK_R):
        sequence = start_r + tl.arange(0, BLOCK_R)
        end_r = tl.load(offsets + 1 + sequence, mask=sequence < R, other=start + 1)
        r += tl.sum((end_r <= start).to(tl.int32), axis=0)
    dsum_t = tl.zeros((BLOCK,), tl.float32)
    begin = tl.load(offsets + r)
    while (r < R) & (begin < start + BLOCK):
        end = tl.load(offsets + r + 1)
        inside = (token >= begin) & (token < end)
        dsum_t = tl.where(inside, tl.load(dsums + r).to(tl.float32), dsum_t)
        begin = end
        r += 1
    mask = token < T
    if WEIGHTED:
        weight = tl.load(weights + token, mask=mask, other=0.0).to(tl.float32)
        counted = (token >= tl.load(offsets)) & (token < tl.load(offsets + R))
        counted &= weight != 0.0
        # Masked after the product, which may be NaN in tokens that are not counted.
        grad = tl.where(counted, weight * dsum_t, 0.0)
        tl.store(dvalues + token, grad.to(dvalues.dtype.element_ty), mask=mask)
        if WANT_DWEIGHTS:
            value = tl.load(values + token, mask=mask, other=0.0).to(tl.float32)
            grad = tl.where(counted, value * dsum_t, 0.0)
            tl.store(dweights + token, grad.to(dweights.dtype.element_ty), mask=mask)
    else:
        tl.store(dvalues + token, dsum_t.to(dvalues.dtype.element_ty), mask=mask)
