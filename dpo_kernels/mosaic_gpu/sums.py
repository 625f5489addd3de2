"""`sequence_sums` in Pallas Mosaic GPU, for Hopper and newer.

One warpgroup for each sequence in the forward, one for each block of tokens in the
backward.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_kernels.mosaic_gpu import axes
from dpo_kernels.op.loops import make_varying, varying_axes
from dpo_kernels.op.sums import Problem, gpu_reason

# Tokens of a block. A thread of the forward reads up to 32 at once, to have enough
# under way; a block much longer than the sequences would read their neighbours' tokens.
_FORWARD_BLOCKS = (512, 1024, 2048, 4096)
_BACKWARD_BLOCKS = (512, 256, 128)


def unsupported(problem: Problem) -> str | None:
    """See `SumsBackend.unsupported`."""
    return gpu_reason(problem, (9, 0))


def forward(
    problem: Problem,
    values: Float[Array, " T"],
    weights: Float[Array, " T"] | None,
    offsets: Int[Array, " R1"],
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """See `SumsBackend.forward`."""
    from dpo_kernels.mosaic_gpu import sums_kernels as kernels

    arrays = [_padded(x) for x in (values, weights) if x is not None]
    capacity, mean_length = arrays[0].shape[0], problem.T // problem.R
    block = next((b for b in _FORWARD_BLOCKS if b >= mean_length), _FORWARD_BLOCKS[-1])
    while block > capacity:
        block //= 2
    sums, counts = _launch(
        functools.partial(kernels.sums_kernel, problem.T, block),
        "sequence_sums",
        [*arrays, offsets],
        [jax.ShapeDtypeStruct((problem.R,), jnp.float32)] * 2,
        grid={axes.SEQUENCE: problem.R},
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
    from dpo_kernels.mosaic_gpu import sums_kernels as kernels

    arrays = [_padded(x) for x in (values, weights) if x is not None]
    capacity = -(-problem.T // kernels.WARPGROUP) * kernels.WARPGROUP
    block = next(b for b in _BACKWARD_BLOCKS if capacity % b == 0)
    dtypes = [problem.dtype] + [problem.weights_dtype] * (values is not None)
    grads = _launch(
        functools.partial(
            kernels.gradient_kernel, block, weights is not None, values is not None
        ),
        "sequence_sums_gradient",
        [*arrays, offsets, dsums.astype(jnp.float32)],
        [jax.ShapeDtypeStruct((capacity,), dtype) for dtype in dtypes],
        grid={axes.TOKENS: capacity // block},
    )
    dvalues, *dweights = (grad[: problem.T] for grad in grads)
    return dvalues, dweights[0] if dweights else None


def _padded(x: Float[Array, " T"]) -> Float[Array, " capacity"]:
    """`x` up to a whole number of warps' loads; as it is where 128 divides T."""
    from dpo_kernels.mosaic_gpu import sums_kernels as kernels

    return jnp.pad(x, (0, -x.shape[0] % kernels.WARPGROUP))


def _launch(
    body: Callable[..., None],
    name: str,
    arrays: list[Array],
    out: list[jax.ShapeDtypeStruct],
    grid: dict[str, int],
) -> tuple[Array, ...]:
    import jax.experimental.pallas.mosaic_gpu as plgpu

    kernel = plgpu.kernel(
        body,
        out_type=tuple(out),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        kernel_name=name,
    )
    results: Any = kernel(*arrays)
    # Pallas does not say over which mesh axes its results vary.
    varying = varying_axes(*arrays)
    return tuple(make_varying(x, varying) for x in results)
