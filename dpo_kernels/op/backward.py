"""The backward that every backend shares: a loop over chunks of the vocabulary.

    dlogits [t, v] = kept exponentials times what their rows need, or recomputed
    d hidden [t, D] += dlogits @ head[v],  d head [v, D] = dlogits.T @ hidden,
    d bias [v] = the sum of dlogits over rows

Recomputing costs 8TDV FLOPs with the forward's, against 6TDV where all exponentials
were kept; the workspace decides how many are.
"""

import functools
from collections.abc import Callable
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
    logprob: Array,
    top: Array,
    sum_exp: Array,
    dlogprob: Array,
    dlse: Array,
    factor: Array | float,
) -> RowCoefficients:
    """dz = dlogprob * (onehot - p) + dlse * p, split into its two cases.

    At the target 1 - p is -expm1(logprob), which keeps its digits when p is near 1.
    Elsewhere p = exp(z - top) / sum_exp, of the row's maximum `top` and the sum of its
    exp(z - top): unlike lse, both have all their digits however large the logits are.
    """
    at_target = dlse * accurate.exp(logprob) - dlogprob * accurate.expm1(logprob)
    exists = sum_exp > 0  # not so in padding, and in a row without any vocabulary
    p_coef = (dlse - dlogprob) * factor / jnp.where(exists, sum_exp, 1)
    return RowCoefficients(
        # exp(z - inf) is 0, also of z = -inf, where z - top would be NaN.
        shift=jnp.where(exists, top, jnp.inf),
        p_coef=jnp.where(exists, p_coef, 0),
        target_grad=at_target * factor,
    )


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


class _Rows(NamedTuple):
    """A block of rows; those that are not fresh, or padding, contribute nothing."""

    start: Any
    hidden: Float[Array, "t D"]
    targets: Int[Array, " t"]
    coefficients: RowCoefficients
    fresh: Bool[Array, " t"]


class _Chunk(NamedTuple):
    """Of the vocabulary; `start` is traced within a loop."""

    start: Any
    size: int
    head: Float[Array, "v D"]


_DlogitsOf = Callable[[_Rows, _Chunk], Float[Array, "t v"]]


def _on_rows(job: Job, height: int) -> Gradients:
    """The gradients from the leading `height` rows, in the shapes of all."""
    T, V = job.inputs.hidden.shape[0], job.inputs.head.shape[0]
    tile, scale = job.tile, job.scale
    # Taken outside the loop over chunks, from which XLA does not move it.
    one_block = height <= tile.block_t
    rows = _rows(job, 0, jnp.ones((height,), bool)) if one_block else None

    def add_chunk(
        dlogits_of: _DlogitsOf, start_v: Any, size: int, grads: Gradients
    ) -> Gradients:
        chunk = _Chunk(start_v, size, take_rows(job.inputs.head, start_v, size))
        sums = _no_sums(job, height, chunk, grads)
        if rows is None:
            sums = _add_blocks_of_rows(job, height, dlogits_of, chunk, sums)
        else:
            held, sums = _after(start_v, rows, sums)
            sums = _add_products(dlogits_of(held, chunk), held, chunk, sums)
        return _with_chunk(job, grads, chunk, sums)

    grads = _no_gradients(job, height if one_block else T)
    keep_v = 0 if job.kept is None else tile.keep_v
    for first, last, dlogits_of in (
        (0, keep_v, functools.partial(_kept_dlogits, job)),
        (keep_v, V, functools.partial(_recomputed_dlogits, job)),
    ):
        step = functools.partial(add_chunk, dlogits_of)
        grads = for_each_chunk(first, last, tile.chunk_v, step, grads)
    if grads.hidden is None:
        return grads
    padding = ((0, T - grads.hidden.shape[0]), (0, 0))
    return grads._replace(hidden=jnp.pad(scale.of_product(grads.hidden), padding))


def _no_gradients(job: Job, num_rows: int) -> Gradients:
    """Zeros to add to, of `num_rows`; for head and bias what chunks are written into.

    Several blocks add to their rows in place. What a single one adds to is a product's
    operand, of its height: the padding comes after it, when the workspace is free.
    """
    head, bias, wanted = job.inputs.head, job.inputs.bias, job.wanted
    V, D = head.shape
    acc = accumulator(head.dtype)
    dbias = job.zeros((V,), acc if bias is None else bias.dtype)
    dhead = uninitialized(head.shape, head.dtype, job.axes)
    return Gradients(
        hidden=None if wanted.hidden is None else job.zeros((num_rows, D), acc),
        head=None if wanted.head is None else dhead,
        bias=None if wanted.bias is None else dbias,
    )


def _no_sums(job: Job, height: int, chunk: _Chunk, grads: Gradients) -> Gradients:
    """d hidden so far, and zeros for what is summed over rows within a chunk."""
    head = job.inputs.head
    acc = accumulator(head.dtype)
    at_once = tiling.writes_dhead_at_once(head.dtype, height, job.tile.block_t)
    dhead = job.zeros(chunk.head.shape, head.dtype if at_once else acc)
    return Gradients(
        hidden=grads.hidden,
        head=None if grads.head is None else dhead,
        bias=None if grads.bias is None else job.zeros((chunk.size,), acc),
    )


def _after(start_v: Any, rows: _Rows, sums: Gradients) -> tuple[_Rows, Gradients]:
    """The rows, for a last chunk no sooner than the sums of those before it are there.

    Else XLA may compute its dlogits before the loop over the others, and hold them
    throughout.
    """
    if not isinstance(start_v, int) or start_v == 0:
        return rows, sums
    sums, targets = lax.optimization_barrier((sums, rows.targets))
    return rows._replace(targets=targets), sums


def _add_blocks_of_rows(
    job: Job, height: int, dlogits_of: _DlogitsOf, chunk: _Chunk, sums: Gradients
) -> Gradients:
    """As `_add_products`, of several blocks of rows one after another."""

    def block(start_t: Any, fresh_t: Array, sums: Gradients) -> Gradients:
        rows = _rows(job, start_t, fresh_t)
        return _add_products(dlogits_of(rows, chunk), rows, chunk, sums)

    # Of several heights one was chosen by the number of valid rows already.
    num_valid = job.inputs.num_valid if len(job.tile.heights) == 1 else None
    return for_each_row_block(height, job.tile.block_t, num_valid, block, sums)


def _add_products(
    dlogits_tv: Array, rows: _Rows, chunk: _Chunk, sums: Gradients
) -> Gradients:
    """The two products and the sum over rows; a sum's dtype is its product's, too."""
    dhidden, dhead, dbias = sums
    if dhidden is not None:
        dhidden_t = jnp.einsum(
            "tv,vD->tD", dlogits_tv, chunk.head, preferred_element_type=dhidden.dtype
        )
        before_t = take_rows(dhidden, rows.start, rows.hidden.shape[0])
        dhidden = put_rows(dhidden, before_t + dhidden_t, rows.start)
    if dhead is not None:
        dhead += jnp.einsum(
            "tv,tD->vD", dlogits_tv, rows.hidden, preferred_element_type=dhead.dtype
        )
    if dbias is not None:
        dbias += dlogits_tv.sum(axis=0, dtype=dbias.dtype)
    return Gradients(dhidden, dhead, dbias)


def _with_chunk(
    job: Job, grads: Gradients, chunk: _Chunk, sums: Gradients
) -> Gradients:
    """The sums of a chunk put into the gradients of head and bias, once and for all."""
    dhead, dbias = grads.head, grads.bias
    if dhead is not None and sums.head is not None:
        dhead_v = job.scale.of_product(sums.head).astype(dhead.dtype)
        dhead = put_rows(dhead, dhead_v, chunk.start)
    if dbias is not None and sums.bias is not None:
        dbias_v = job.scale.of_sum(sums.bias).astype(dbias.dtype)
        dbias = put_rows(dbias, dbias_v, chunk.start)
    return Gradients(sums.hidden, dhead, dbias)


def _rows(job: Job, start_t: Any, fresh_t: Array) -> _Rows:
    """Those from `start_t` on; `fresh_t` are those that no other block has done."""
    inputs, length = job.inputs, fresh_t.shape[0]
    hidden, targets, shift, p_coef, target_grad = (
        take_rows(x, start_t, length)
        for x in (inputs.hidden, inputs.targets, *job.rows)
    )
    if inputs.num_valid is not None:
        fresh_t &= start_t + jnp.arange(length, dtype=jnp.int32) < inputs.num_valid
        # Padding may hold NaN, and 0 * NaN is no zero in the matmuls.
        hidden = jnp.where(fresh_t[:, None], hidden, jnp.zeros((), hidden.dtype))
    coefficients = RowCoefficients(
        shift=jnp.where(fresh_t, shift, jnp.inf),
        p_coef=jnp.where(fresh_t, p_coef, 0),
        target_grad=jnp.where(fresh_t, target_grad, 0),
    )
    return _Rows(start_t, hidden, targets, coefficients, fresh_t)


def _recomputed_dlogits(job: Job, rows: _Rows, chunk: _Chunk) -> Array:
    bias, dlogits = job.inputs.bias, job.backend.dlogits
    assert dlogits is not None, "without it a backend has its own backward"
    return dlogits(
        rows.hidden,
        chunk.head,
        rows.targets - chunk.start,
        None if bias is None else take_rows(bias, chunk.start, chunk.size),
        *rows.coefficients,
        options=job.options,
    )


def _kept_dlogits(job: Job, rows: _Rows, chunk: _Chunk) -> Array:
    assert job.kept is not None, "the tile keeps only what the forward has kept"
    return kept_dlogits(
        job.kept,
        rows.targets - chunk.start,
        rows.fresh,
        rows.start,
        chunk.start,
        chunk.size,
    )
