"""The backend that runs anywhere: plain JAX over tiles of logits in a workspace."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dpo_kernels.op import tiling
from dpo_kernels.op.interface import (
    Kept,
    LogitOptions,
    Partials,
    accumulator,
    capped,
    finite_shift,
    kept_of,
    kept_scale,
)
from dpo_kernels.op.loops import (
    for_each_chunk,
    for_each_row_block,
    make_varying,
    take_rows,
    uninitialized,
    varying_axes,
)

fused_dlogits = False
backward = None


def unsupported(problem: tiling.Problem) -> str | None:
    """None: this one runs anywhere."""
    del problem


def _tile_logits(hidden, head, bias, options: LogitOptions):
    """x = scale * hidden @ head.T + bias and z = cap(x); z is -inf where bias is."""
    x_tv = options.scale * jnp.einsum(
        "TD,VD->TV", hidden, head, preferred_element_type=accumulator(hidden.dtype)
    )
    if bias is None:
        return x_tv, capped(x_tv, options.softcap)
    exists_v = bias != -jnp.inf
    x_tv = x_tv + jnp.where(exists_v, bias, jnp.zeros_like(bias)).astype(x_tv.dtype)
    # The cap comes before the mask: capped, a masked -inf would be a finite -softcap.
    return x_tv, jnp.where(exists_v, capped(x_tv, options.softcap), -jnp.inf)


def _reduce_tile(
    hidden, head, bias, targets, options: LogitOptions, keep: bool
) -> tuple[Partials, Array | None]:
    """One tile's partials, each of shape [t], and the exponentials to keep."""
    with_rank_promotion = None if bias is None else bias[None]
    x_tv, z_tv = _tile_logits(hidden, head, with_rank_promotion, options)
    max_t = z_tv.max(axis=1)
    diff_tv = z_tv - finite_shift(max_t)[:, None]
    e_tv = jnp.exp(diff_tv)
    hit_tv = jnp.arange(z_tv.shape[1], dtype=jnp.int32)[None] == targets[:, None]
    exists_v = jnp.ones(z_tv.shape[1], bool) if bias is None else bias != -jnp.inf

    def finite(x_tv: Array) -> Array:
        return x_tv if bias is None else jnp.where(exists_v[None], x_tv, 0.0)

    partials = Partials(
        max=max_t,
        sum_exp=e_tv.sum(axis=1),
        target_logit=jnp.where(hit_tv, z_tv, -jnp.inf).max(axis=1),
    )
    if "entropy" in options.stats:
        exp_diff_t = (e_tv * finite(diff_tv)).sum(axis=1)
        partials = partials._replace(sum_exp_diff=exp_diff_t)
    if "collision" in options.stats:
        partials = partials._replace(sum_exp2=(e_tv * e_tv).sum(axis=1))
    if "mean_logit" in options.stats:
        count = jnp.broadcast_to(exists_v.sum().astype(z_tv.dtype), max_t.shape)
        sum_t = finite(z_tv).sum(axis=1)
        partials = partials._replace(sum_logit=sum_t, num_logits=count)
    if not keep:
        return partials, None
    kept_tv = e_tv * (_cap_slope(x_tv, options) * kept_scale(hidden.dtype))
    return partials, kept_tv.astype(hidden.dtype)


def _cap_slope(x_tv: Array, options: LogitOptions) -> Array | float:
    """cap'(x); of x, not z, which is -inf where the bias is."""
    if options.softcap is None:
        return 1.0
    return 1 - jnp.tanh(x_tv / options.softcap) ** 2


def forward_partials(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " T"],
    bias: Float[Array, " V"] | None,
    num_valid: Int[Array, ""] | None,
    *,
    options: LogitOptions,
    workspace_bytes: int,
    keep_v: int,
) -> tuple[Partials, Kept | None]:
    """See `Backend.forward_partials`; one block per vocabulary chunk of the tile."""
    T, V = hidden.shape[0], head.shape[0]
    acc = accumulator(hidden.dtype)
    problem = tiling.problem_of(hidden, head, num_valid, workspace_bytes)
    tile = tiling.xla_forward_tile(problem, keep_v)
    # No chunk holds both kept entries and others.
    kept_chunks = -(-keep_v // tile.chunk_v)
    num_chunks = kept_chunks + -(-(V - keep_v) // tile.chunk_v)
    axes = varying_axes(hidden, head, targets, bias, num_valid)

    def empty(fill: float) -> Array:
        return make_varying(jnp.full((num_chunks, T), fill, acc), axes)

    has = options.stats.__contains__
    partials = Partials(
        max=empty(-jnp.inf),
        sum_exp=empty(0),
        target_logit=empty(-jnp.inf),
        sum_exp_diff=empty(0) if has("entropy") else None,
        sum_exp2=empty(0) if has("collision") else None,
        sum_logit=empty(0) if has("mean_logit") else None,
        num_logits=empty(0) if has("mean_logit") else None,
    )

    def chunk(first_chunk: int, first_v: int, start_v, size: int, carry):
        head_v = take_rows(head, start_v, size)
        bias_v = None if bias is None else take_rows(bias, start_v, size)

        def rows(start_t, _fresh, carry):
            # The last block is moved back to end with the rows: those it shares with
            # the block before it are computed again, to the same values. Padding rows
            # get values that `token_logprobs` replaces by 0.
            partials, exp = carry
            tile_t, kept_tv = _reduce_tile(
                take_rows(hidden, start_t, tile.block_t),
                head_v,
                bias_v,
                take_rows(targets, start_t, tile.block_t) - start_v,
                options,
                keep=exp is not None,
            )
            row = jnp.int32(first_chunk + (start_v - first_v) // tile.chunk_v)
            partials = jax.tree.map(
                lambda x, update: _put(x, update[None], (row, start_t)),
                partials,
                tile_t,
            )
            if exp is not None and kept_tv is not None:
                exp = _put(exp, kept_tv, (start_t, start_v))
            return partials, exp

        return for_each_row_block(T, tile.block_t, num_valid, rows, carry)

    kept = None
    if keep_v:
        carry = partials, uninitialized((T, keep_v), hidden.dtype, axes)
        body = functools.partial(chunk, 0, 0)
        partials, exp = for_each_chunk(0, keep_v, tile.chunk_v, body, carry)
        kept = kept_of(exp, partials, tile.chunk_v)
    body = functools.partial(chunk, kept_chunks, keep_v)
    partials, _ = for_each_chunk(keep_v, V, tile.chunk_v, body, (partials, None))
    return partials, kept


def _put(x: Array, update: Array, at: tuple[Any, Any]) -> Array:
    return lax.dynamic_update_slice(x, update, tuple(map(jnp.int32, at)))


def dlogits(
    hidden: Float[Array, "T D"],
    head: Float[Array, "chunk D"],
    targets: Int[Array, " T"],
    bias: Float[Array, " chunk"] | None,
    shift: Float[Array, " T"],
    p_coef: Float[Array, " T"],
    target_grad: Float[Array, " T"],
    *,
    options: LogitOptions,
) -> Float[Array, "T chunk"]:
    """See `Dlogits`."""
    row_bias = None if bias is None else bias[None]
    x_tv, z_tv = _tile_logits(hidden, head, row_bias, options)
    hit_tv = jnp.arange(z_tv.shape[1], dtype=jnp.int32)[None] == targets[:, None]
    e_tv = jnp.exp(z_tv - shift[:, None])
    dx_tv = jnp.where(hit_tv, target_grad[:, None], p_coef[:, None] * e_tv)
    dx_tv = dx_tv * _cap_slope(x_tv, options)
    if bias is not None:
        dx_tv = jnp.where(row_bias == -jnp.inf, 0.0, dx_tv)
    return dx_tv.astype(hidden.dtype)
