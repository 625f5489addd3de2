"""The backward that every backend shares: dlogits a tile at a time, then two matmuls.

Recomputing costs 8TDV FLOPs with the forward's, against 6TDV where all exponentials
were kept; the workspace decides how many are.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dpo_kernels.op import accurate, tiling
from dpo_kernels.op.interface import accumulator
from dpo_kernels.op.job import Gradients, Job, RowCoefficients
from dpo_kernels.op.kept import kept_dlogits
from dpo_kernels.op.loops import (
    for_each_chunk,
    for_each_row_block,
    put_rows,
    take_rows,
    uninitialized,
)


def row_coefficients(
    logprob: Array, lse: Array, dlogprob: Array, dlse: Array, factor: Array | float
) -> RowCoefficients:
    """dz = dlogprob * (onehot - p) + dlse * p, split into its two cases.

    At the target 1 - p is -expm1(logprob), which keeps its digits when p is near 1.
    """
    at_target = dlse * accurate.exp(logprob) - dlogprob * accurate.expm1(logprob)
    return RowCoefficients(
        # A row without any vocabulary has lse -inf: exp(z - inf) is 0, not NaN.
        lse=jnp.where(lse == -jnp.inf, jnp.inf, lse),
        p_coef=(dlse - dlogprob) * factor,
        target_grad=at_target * factor,
    )


def dlogits_factor(
    dtype: Any, scale: float, dlogprob: Array, dlse: Array
) -> Array | float:
    """What dlogits are multiplied by: `scale`, which the matmuls' results then have.

    In float16 a power of two, exact in both directions, so that small ones do not flush
    to 0. A row's dlogits sum in absolute value to at most 2 * |dlogprob| + |dlse|:
    scaled to 2**10 they stay far from float16's 65504.
    """
    if dtype != jnp.float16:
        return scale or 1.0
    most = jnp.max(2 * jnp.abs(dlogprob) + jnp.abs(dlse))
    exponent = jnp.where(most > 0, 10 - jnp.ceil(jnp.log2(most)), 0.0)
    return jnp.exp2(jnp.clip(exponent, -100, 100))


def backward(job: Job) -> Gradients:
    """The gradients that are wanted; of `hidden`'s, this device's share.

    That of `hidden` is left in the accumulator's dtype, to be summed over devices;
    those of `head` and `bias` are written once, a chunk at a time.
    """
    if job.backend.backward is not None:
        return job.backend.backward(job)
    num_valid, heights = job.inputs.num_valid, job.tile.heights
    if num_valid is None or len(heights) == 1:
        return _on_rows(job, heights[-1])
    # One choice, then code of static shapes: a GPU waits for the host at every turn of
    # a loop whose length is traced, and copies what a matmul reads at a traced row.
    choice = (num_valid > jnp.asarray(heights[:-1], num_valid.dtype)).sum()
    return lax.switch(choice, [functools.partial(_on_rows, job, h) for h in heights])


def _on_rows(job: Job, height: int) -> Gradients:
    """The gradients from the leading `height` rows, in the shapes of all."""
    hidden, head, bias = job.inputs.hidden, job.inputs.head, job.inputs.bias
    acc, wanted = accumulator(hidden.dtype), job.wanted
    (T, D), V = hidden.shape, head.shape[0]
    only_block = None
    if height <= job.tile.block_t:
        # Outside the loop over chunks, from which XLA does not move it.
        only_block = _rows(job, 0, jnp.ones((height,), bool))

    def chunk(kept: bool, start_v: Any, size: int, grads: Gradients) -> Gradients:
        rows = only_block
        if rows is not None and isinstance(start_v, int) and start_v > 0:
            # Else XLA may compute this chunk's dlogits before the loop over those
            # before it, and hold them throughout.
            grads, targets = lax.optimization_barrier((grads, rows.targets))
            rows = rows._replace(targets=targets)
        return _add_chunk(job, height, rows, kept, start_v, size, grads)

    dhead = uninitialized(head.shape, head.dtype, job.axes)
    dbias = job.zeros((V,), acc if bias is None else bias.dtype)
    # Several blocks add to their rows in place. What a single one adds to is a matmul's
    # operand, of its height: the padding comes after it, when the workspace is free.
    num_rows = height if only_block is not None else T
    grads = Gradients(
        hidden=None if wanted.hidden is None else job.zeros((num_rows, D), acc),
        head=None if wanted.head is None else dhead,
        bias=None if wanted.bias is None else dbias,
    )
    keep_v = 0 if job.kept is None else job.tile.keep_v
    chunk_v = job.tile.chunk_v
    grads = for_each_chunk(0, keep_v, chunk_v, functools.partial(chunk, True), grads)
    grads = for_each_chunk(keep_v, V, chunk_v, functools.partial(chunk, False), grads)
    if grads.hidden is None:
        return grads
    dhidden = grads.hidden * (job.options.scale / job.factor)
    return grads._replace(hidden=jnp.pad(dhidden, ((0, T - num_rows), (0, 0))))


def _add_chunk(
    job: Job,
    height: int,
    only_block: "_Rows | None",
    kept: bool,
    start_v: Any,
    size: int,
    grads: Gradients,
) -> Gradients:
    """`grads` with those of one chunk added to `hidden`'s, put into the others'."""
    head = job.inputs.head
    acc, head_v = accumulator(head.dtype), take_rows(head, start_v, size)
    at_once = tiling.writes_dhead_at_once(head.dtype, height, job.tile.block_t)

    def block(start_t: Any, fresh_t: Array, sums: Gradients) -> Gradients:
        rows = only_block or _rows(job, start_t, fresh_t)
        if kept:
            dlogits = _dlogits_of_kept(job, rows, start_t, start_v, size)
        else:
            dlogits = _recomputed_dlogits(job, rows, head_v, start_v)
        return _add_tile(dlogits, rows.hidden, head_v, start_t, sums)

    # Within the chunk, head and bias gradients are sums over the blocks of rows.
    dhead_v = job.zeros(head_v.shape, head.dtype if at_once else acc)
    sums = Gradients(
        hidden=grads.hidden,
        head=None if grads.head is None else dhead_v,
        bias=None if grads.bias is None else job.zeros((size,), acc),
    )
    # Of several heights one was chosen by the number of valid rows already.
    num_valid = job.inputs.num_valid if len(job.tile.heights) == 1 else None
    sums = for_each_row_block(height, job.tile.block_t, num_valid, block, sums)
    dhead, dbias = grads.head, grads.bias
    if dhead is not None:
        dhead_v = (sums.head * (job.options.scale / job.factor)).astype(head.dtype)
        dhead = put_rows(dhead, dhead_v, start_v)
    if dbias is not None:
        dbias_v = (sums.bias / job.factor).astype(dbias.dtype)
        dbias = put_rows(dbias, dbias_v, start_v)
    return Gradients(sums.hidden, dhead, dbias)


class _Rows(NamedTuple):
    hidden: Float[Array, "t D"]
    targets: Int[Array, " t"]
    coefficients: RowCoefficients
    fresh: Bool[Array, " t"]


def _rows(job: Job, start_t: Any, fresh_t: Array) -> _Rows:
    """One block of rows; those that are not fresh, or padding, contribute nothing."""
    inputs, length = job.inputs, fresh_t.shape[0]
    hidden, targets, lse, p_coef, target_grad = (
        take_rows(x, start_t, length)
        for x in (inputs.hidden, inputs.targets, *job.rows)
    )
    if inputs.num_valid is not None:
        fresh_t &= start_t + jnp.arange(length, dtype=jnp.int32) < inputs.num_valid
        # Padding may hold NaN, and 0 * NaN is no zero in the matmuls.
        hidden = jnp.where(fresh_t[:, None], hidden, jnp.zeros((), hidden.dtype))
    coefficients = RowCoefficients(
        lse=jnp.where(fresh_t, lse, jnp.inf),
        p_coef=jnp.where(fresh_t, p_coef, 0),
        target_grad=jnp.where(fresh_t, target_grad, 0),
    )
    return _Rows(hidden, targets, coefficients, fresh_t)


def _recomputed_dlogits(
    job: Job, rows: _Rows, head_v: Array, start_v: Any
) -> Float[Array, "t v"]:
    bias, dlogits = job.inputs.bias, job.backend.dlogits
    assert dlogits is not None, "without it a backend has its own backward"
    return dlogits(
        rows.hidden,
        head_v,
        rows.targets - start_v,
        None if bias is None else take_rows(bias, start_v, head_v.shape[0]),
        *rows.coefficients,
        options=job.options,
    )


def _dlogits_of_kept(
    job: Job, rows: _Rows, start_t: Any, start_v: Any, size: int
) -> Float[Array, "t v"]:
    assert job.kept is not None, "the tile keeps only what the forward has kept"
    return kept_dlogits(
        job.kept,
        rows.targets - start_v,
        rows.fresh,
        start_t,
        start_v,
        size,
    )


def _add_tile(
    dlogits_tv: Array, hidden_t: Array, head_v: Array, start_t: Any, sums: Gradients
) -> Gradients:
    """The two matmuls and the sum over rows; a sum's dtype is its matmul's, too."""
    dhidden, dhead, dbias = sums
    if dhidden is not None:
        dhidden_t = jnp.einsum(
            "tv,vD->tD", dlogits_tv, head_v, preferred_element_type=dhidden.dtype
        )
        before_t = take_rows(dhidden, start_t, hidden_t.shape[0])
        dhidden = put_rows(dhidden, before_t + dhidden_t, start_t)
    if dhead is not None:
        dhead += jnp.einsum(
            "tv,tD->vD", dlogits_tv, hidden_t, preferred_element_type=dhead.dtype
        )
    if dbias is not None:
        dbias += dlogits_tv.sum(axis=0, dtype=dbias.dtype)
    return Gradients(dhidden, dhead, dbias)
