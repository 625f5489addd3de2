"""`sequence_sums` in Triton, through jax-triton, for Ampere and newer.

One program for each sequence in the forward, one for each block of tokens in the
backward. Loads are widest where 16 divides T.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_kernels.op.sums import Problem, gpu_reason
from dpo_kernels.triton.call import launch, missing_package

_NUM_WARPS = 4
_LEAST_BLOCK, _MOST_BLOCK = 512, 4096  # tokens of a block of the forward
_BACKWARD_BLOCK = 512
_MOST_BLOCK_R = 1024  # offsets that are looked at together


def unsupported(problem: Problem) -> str | None:
    """See `SumsBackend.unsupported`."""
    return gpu_reason(problem, (8, 0)) or missing_package()


def forward(
    problem: Problem,
    values: Float[Array, " T"],
    weights: Float[Array, " T"] | None,
    offsets: Int[Array, " R1"],
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """See `SumsBackend.forward`."""
    # Long enough for a whole sequence of the mean length, and for many loads at once.
    block = _power_of_two(problem.T // problem.R)
    sums, counts = _launch(
        "sums_kernel",
        # What is absent needs a pointer all the same.
        [values, offsets if weights is None else weights, offsets],
        (jax.ShapeDtypeStruct((problem.R,), jnp.float32),) * 2,
        programs=problem.R,
        constants={
            "T": problem.T,
            "BLOCK": max(_LEAST_BLOCK, min(block, _MOST_BLOCK)),
            "WEIGHTED": weights is not None,
        },
    )
    return sums, counts


def backward(
    problem: Problem,
    values: Float[Array, " T"] | None,
    weights: Float[Array, " T"] | None,
    offsets: Int[Array, " R1"],
    dsums: Float[Array, " R"],
) -> tuple[Float[Array, " T"], Float[Array, " T"] | None]:
    """See `SumsBackend.backward`."""
    want_dweights = values is not None
    stand_in = jax.ShapeDtypeStruct((1,), jnp.float32)
    dvalues, dweights = _launch(
        "gradient_kernel",
        [offsets if x is None else x for x in (values, weights)] + [offsets, dsums],
        (
            jax.ShapeDtypeStruct((problem.T,), problem.dtype),
            jax.ShapeDtypeStruct((problem.T,), problem.weights_dtype)
            if want_dweights
            else stand_in,
        ),
        programs=-(-problem.T // _BACKWARD_BLOCK),
        constants={
            "T": problem.T,
            "R": problem.R,
            "BLOCK": _BACKWARD_BLOCK,
            "BLOCK_R": min(_power_of_two(problem.R), _MOST_BLOCK_R),
            "WEIGHTED": weights is not None,
            "WANT_DWEIGHTS": want_dweights,
        },
    )
    return dvalues, dweights if want_dweights else None


def _power_of_two(x: int) -> int:
    """The least one that is at least `x`."""
    return 1 << (x - 1).bit_length() if x > 1 else 1


def _launch(
    kernel: str,
    arrays: list[Array],
    out: tuple[jax.ShapeDtypeStruct, ...],
    programs: int,
    constants: dict[str, Any],
) -> tuple[Array, ...]:
    """Run a kernel of `sums_triton_kernels`: inputs, then outputs, then constants."""
    from dpo_kernels.triton import sums_kernels as sums_triton_kernels

    return launch(
        getattr(sums_triton_kernels, kernel),
        arrays,
        out,
        programs,
        name=f"sequence_{kernel}",
        num_warps=_NUM_WARPS,
        **constants,
    )
