"""`sequence_sums` in Pallas for TPUs: all tokens in vector memory, by sequence.

Plain JAX searches the offsets for each token, which a TPU does by gathers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from dpo_kernels.op.loops import result_like, varying_alike
from dpo_kernels.op.sums import Problem, dtype_reason

_SUBLANES, _LANES = 8, 128
_BLOCK = _SUBLANES * _LANES  # tokens of a register
# Tokens, and sequences: four arrays of the former are in vector memory at once.
_MOST_TOKENS, _MOST_SEQUENCES = 2**20, 2**14


def unsupported(problem: Problem) -> str | None:
    """See `SumsBackend.unsupported`."""
    if problem.device.platform != "tpu":
        return f"needs a TPU; this is {problem.device}"
    for name, size, most in (
        ("tokens", problem.T, _MOST_TOKENS),
        ("sequences", problem.R, _MOST_SEQUENCES),
    ):
        if size > most:
            return f"needs at most {most} {name}; these are {size}"
    return dtype_reason(problem)


def forward(
    problem: Problem,
    values: Float[Array, " T"],
    weights: Float[Array, " T"] | None,
    offsets: Int[Array, " R1"],
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """See `SumsBackend.forward`."""
    lanes = (problem.R, _LANES)
    sums, counts = _launch(
        functools.partial(_sums_kernel, problem, weights is not None),
        "sequence_sums",
        [offsets],
        [x for x in (values, weights) if x is not None],
        [lanes, lanes],
    )
    return sums.sum(axis=1), counts.sum(axis=1)


def backward(
    problem: Problem,
    values: Float[Array, " T"] | None,
    weights: Float[Array, " T"] | None,
    offsets: Int[Array, " R1"],
    dsums: Float[Array, " R"],
) -> tuple[Float[Array, " T"], Float[Array, " T"] | None]:
    """See `SumsBackend.backward`."""
    shape = _blocks(problem.T), _LANES
    grads = _launch(
        functools.partial(
            _gradient_kernel, problem, weights is not None, values is not None
        ),
        "sequence_sums_gradient",
        [offsets, dsums.astype(jnp.float32)],
        [x for x in (weights, values) if x is not None],
        [shape] * (1 + (values is not None)),
    )
    dvalues, *dweights = (grad.reshape(-1)[: problem.T] for grad in grads)
    dvalues = dvalues.astype(problem.dtype)
    return dvalues, dweights[0].astype(problem.weights_dtype) if dweights else None


def _blocks(T: int) -> int:
    """Rows of 128 tokens, in whole registers."""
    return pl.cdiv(T, _BLOCK) * _SUBLANES


@jax.enable_x64(False)  # indices are int32
def _launch(body: Any, name: str, scalars, tokens, shapes) -> tuple[Array, ...]:
    def blocks(x: Array) -> Array:
        T = x.shape[0]
        padded = jnp.pad(x.astype(jnp.float32), (0, _blocks(T) * _LANES - T))
        return padded.reshape(-1, _LANES)

    operands = varying_alike(*scalars, *map(blocks, tokens))
    return pl.pallas_call(
        body,
        out_shape=[result_like(operands[0], shape, jnp.float32) for shape in shapes],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)] * len(tokens),
            out_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)] * len(shapes),
        ),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=60 * 2**20),
        name=name,
    )(*operands)


def _for_each_block(problem: Problem, offsets: Any, r: Any, body: Any, carry: Any):
    """Folds `body(rows, inside, carry)` over the registers that sequence r touches."""
    first = jnp.clip(offsets[r], 0, problem.T)
    last = jnp.clip(offsets[r + 1], 0, problem.T)
    iota = functools.partial(lax.broadcasted_iota, jnp.int32, (_SUBLANES, _LANES))
    token = iota(0) * _LANES + iota(1)

    def block(b: Any, carry: Any) -> Any:
        at = b * _BLOCK + token
        rows = pl.ds(pl.multiple_of(b * _SUBLANES, _SUBLANES), _SUBLANES)
        return body(rows, (at >= first) & (at < last), carry)

    # lax.div: neither is negative, and // would see to it that they may be.
    end = jnp.where(last > first, pl.cdiv(last, _BLOCK), 0)
    return lax.fori_loop(lax.div(first, jnp.int32(_BLOCK)), end, block, carry)


def _sums_kernel(problem: Problem, weighted: bool, offsets, values, *rest) -> None:
    weights = rest[0] if weighted else None
    sums, counts = rest[-2:]
    zero = jnp.zeros((_SUBLANES, _LANES), jnp.float32)

    def add(rows: Any, counted: Array, carry: tuple[Array, Array]):
        total, count = carry
        term = values[rows]
        if weights is not None:
            weight = weights[rows]
            counted &= weight != 0
            term = term * weight
        # Masked after the product, which may be NaN where the weight is 0.
        return total + jnp.where(counted, term, 0.0), count + counted.astype(
            jnp.float32
        )

    def sequence(r: Any, _: None) -> None:
        total, count = _for_each_block(problem, offsets, r, add, (zero, zero))
        sums[pl.ds(r, 1)] = total.sum(axis=0, keepdims=True)
        counts[pl.ds(r, 1)] = count.sum(axis=0, keepdims=True)

    lax.fori_loop(0, problem.R, sequence, None)


def _gradient_kernel(
    problem: Problem, weighted: bool, of_weights: bool, offsets, dsums, *rest
) -> None:
    left = list(rest)
    weights = left.pop(0) if weighted else None
    values = left.pop(0) if of_weights else None
    for ref in left:
        ref[...] = jnp.zeros_like(ref)

    def sequence(r: Any, _: None) -> None:
        def put(rows: Any, counted: Array, _: None) -> None:
            grads = [dsums[r]]
            if weights is not None:
                weight = weights[rows]
                counted &= weight != 0
                grads = [dsums[r] * weight]
            if values is not None:
                grads.append(dsums[r] * values[rows])
            for ref, grad in zip(left, grads, strict=True):
                ref[rows] = jnp.where(counted, grad, ref[rows])

        _for_each_block(problem, offsets, r, put, None)

    lax.fori_loop(0, problem.R, sequence, None)
