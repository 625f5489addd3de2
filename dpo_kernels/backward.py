"""The backward that every backend shares: dlogits a tile at a time, then two matmuls.

Recomputing costs 8TDV FLOPs with the forward's, against 6TDV if the logits were kept.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_kernels import tiling
from dpo_kernels.interface import Backend, LogitOptions, accumulator
from dpo_kernels.loops import (
    for_each_chunk,
    for_each_row_block,
    make_varying,
    put_rows,
    take_rows,
    varying_axes,
)


class Gradients(NamedTuple):
    """Of the three differentiable inputs; None where not wanted."""

    hidden: Array | None
    head: Array | None
    bias: Array | None


class Wanted(NamedTuple):
    """Which gradients to compute: () for one that is, None for one that is not.

    As tree structure it stays static, also where it is saved among the residuals.
    """

    hidden: tuple[()] | None
    head: tuple[()] | None
    bias: tuple[()] | None


class RowCoefficients(NamedTuple):
    """What the gradient of a logit needs of its row: see `Backend.dlogits`."""

    lse: Float[Array, " T"]
    p_coef: Float[Array, " T"]
    target_grad: Float[Array, " T"]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of the op, `targets` relative to this device's slice."""

    hidden: Float[Array, "T D"]
    head: Float[Array, "V D"]
    bias: Float[Array, " V"] | None
    targets: Int[Array, " T"]
    num_valid: Int[Array, ""] | None


def row_coefficients(
    logprob: Array, lse: Array, dlogprob: Array, dlse: Array, scale_up: Array | float
) -> RowCoefficients:
    """dz = dlogprob * (onehot - p) + dlse * p, split into its two cases.

    At the target 1 - p is -expm1(logprob), which keeps its digits when p is near 1.
    """
    at_target = dlse * jnp.exp(logprob) - dlogprob * jnp.expm1(logprob)
    return RowCoefficients(
        # A row without any vocabulary has lse -inf: exp(z - inf) is 0, not NaN.
        lse=jnp.where(lse == -jnp.inf, jnp.inf, lse),
        p_coef=(dlse - dlogprob) * scale_up,
        target_grad=at_target * scale_up,
    )


def power_of_two(dtype: Any, dlogprob: Array, dlse: Array) -> Array | float:
    """What float16 dlogits are multiplied by so that small ones do not flush to 0.

    Exact in both directions. A row's dlogits sum in absolute value to at most
    2 * |dlogprob| + |dlse|: scaled to 2**10 they stay far from float16's 65504.
    """
    if dtype != jnp.float16:
        return 1.0
    most = jnp.max(2 * jnp.abs(dlogprob) + jnp.abs(dlse))
    exponent = jnp.where(most > 0, 10 - jnp.ceil(jnp.log2(most)), 0.0)
    return jnp.exp2(jnp.clip(exponent, -100, 100))


def backward(
    backend: Backend,
    options: LogitOptions,
    inputs: Inputs,
    rows: RowCoefficients,
    wanted: Wanted,
    *,
    scale_up: Array | float,
    workspace_bytes: int,
) -> Gradients:
    """The gradients that are wanted; of `hidden`'s, this device's share.

    That of `hidden` is left in the accumulator's dtype, to be summed over devices;
    those of `head` and `bias` are written once, a chunk at a time.
    """
    hidden, head, bias = inputs.hidden, inputs.head, inputs.bias
    (T, D), V = hidden.shape, head.shape[0]
    acc = accumulator(hidden.dtype)
    problem = tiling.problem_of(hidden, head, inputs.num_valid, workspace_bytes)
    tile = tiling.backward_tile(problem)
    unscale = options.scale / scale_up
    axes = varying_axes(hidden, head, bias, inputs.targets, inputs.num_valid, *rows)

    def zeros(shape: tuple[int, ...], dtype: Any, want: Any) -> Array | None:
        return None if want is None else make_varying(jnp.zeros(shape, dtype), axes)

    def chunk(start_v: Any, size: int, grads: Gradients) -> Gradients:
        head_v = take_rows(head, start_v, size)
        bias_v = None if bias is None else take_rows(bias, start_v, size)

        def block(start_t: Any, fresh_t: Array, grads: Gradients) -> Gradients:
            tile_rows = _rows_of(inputs, rows, start_t, start_v, fresh_t)
            return _add_tile(
                backend, options, tile_rows, head_v, bias_v, start_t, grads
            )

        # Within the chunk, head and bias gradients are sums over the blocks of rows.
        sums = zeros((size, D), acc, wanted.head), zeros((size,), acc, wanted.bias)
        sums = for_each_row_block(
            T, tile.block_t, inputs.num_valid, block, Gradients(grads.hidden, *sums)
        )
        dhead, dbias = grads.head, grads.bias
        if dhead is not None:
            dhead = put_rows(dhead, (sums.head * unscale).astype(head.dtype), start_v)
        if dbias is not None:
            dbias = put_rows(dbias, (sums.bias / scale_up).astype(dbias.dtype), start_v)
        return Gradients(sums.hidden, dhead, dbias)

    grads = Gradients(
        hidden=zeros((T, D), acc, wanted.hidden),
        head=zeros((V, D), head.dtype, wanted.head),
        bias=zeros((V,), acc if bias is None else bias.dtype, wanted.bias),
    )
    grads = for_each_chunk(V, tile.chunk_v, chunk, grads)
    if grads.hidden is None:
        return grads
    return grads._replace(hidden=grads.hidden * unscale)


def _rows_of(
    inputs: Inputs, rows: RowCoefficients, start_t: Any, start_v: Any, fresh_t: Array
) -> tuple[Array, Array, RowCoefficients]:
    """One block's hidden states, targets within the chunk, and coefficients."""
    hidden, targets, lse, p_coef, target_grad = (
        take_rows(x, start_t, fresh_t.shape[0])
        for x in (inputs.hidden, inputs.targets, *rows)
    )
    if inputs.num_valid is not None:
        # Padding may hold NaN, and 0 * NaN is no zero in the matmuls.
        hidden = jnp.where(fresh_t[:, None], hidden, jnp.zeros((), hidden.dtype))
    masked = RowCoefficients(
        lse=lse,
        p_coef=jnp.where(fresh_t, p_coef, 0),
        target_grad=jnp.where(fresh_t, target_grad, 0),
    )
    return hidden, targets - start_v, masked


def _add_tile(
    backend: Backend,
    options: LogitOptions,
    tile_rows: tuple[Array, Array, RowCoefficients],
    head_v: Array,
    bias_v: Array | None,
    start_t: Any,
    grads: Gradients,
) -> Gradients:
    hidden_t, targets_t, coefficients = tile_rows
    acc = accumulator(hidden_t.dtype)
    dlogits_tv, dbias_v = backend.dlogits(
        hidden_t,
        head_v,
        targets_t,
        bias_v,
        *coefficients,
        options=options,
        want_dbias=grads.bias is not None,
    )
    dhidden, dhead, dbias = grads
    if dhidden is not None:
        dhidden_t = jnp.einsum(
            "tv,vD->tD", dlogits_tv, head_v, preferred_element_type=acc
        )
        before_t = take_rows(dhidden, start_t, hidden_t.shape[0])
        dhidden = put_rows(dhidden, before_t + dhidden_t, start_t)
    if dhead is not None:
        dhead += jnp.einsum(
            "tv,tD->vD", dlogits_tv, hidden_t, preferred_element_type=acc
        )
    if dbias is not None:
        assert dbias_v is not None, "a backend returns what want_dbias asks for"
        dbias += dbias_v
    return Gradients(dhidden, dhead, dbias)
