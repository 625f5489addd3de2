"""Kernels of `sequence_sums` by name, what one must offer, and the choice among them.

What a kernel can gain, by arithmetic for an H200, not by measurement. The floor is
latency: T=65536 float32 values with weights are 0.5 MB, 0.1 us at 4.8 TB/s, while a
launch takes about 2 us and a kernel waits twice for memory, 0.7 us each: for offsets,
then for tokens. Plain JAX compares each token with each sequence, at 8 bytes from the
L2 cache: as cheap as the launch up to R T of a million, where most batches of
preference pairs are, but some 50 us at R=512 and T=65536. There a kernel saves a few
tens of microseconds. On one sequence of 65536 tokens it loses some: a single warpgroup,
16 KB at once, waits 16 times.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_kernels.op.choice import Choice
from dpo_kernels.op.devices import Device

# The order in which `auto` tries them: that of `token_logprobs`.
BACKENDS = {
    "mosaic_gpu": "dpo_kernels.mosaic_gpu.sums",
    "triton": "dpo_kernels.triton.sums",
    "pallas_tpu": "dpo_kernels.pallas_tpu.sums",
    "xla": "dpo_kernels.xla.sums",
}
_KERNEL_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is static about one call; T and R are at least 1."""

    T: int
    R: int
    dtype: jnp.dtype  # of the values
    weights_dtype: jnp.dtype | None
    device: Device


@runtime_checkable
class SumsBackend(Protocol):
    """Sums of contiguous sequences and their gradient; `offsets` are int32.

    An offset outside [0, T] counts as the nearer end. Other than non-decreasing offsets
    may give any numbers, but touch no memory outside the arrays.
    """

    def unsupported(self, problem: Problem) -> str | None:
        """Why it cannot do this, as `needs ...; this is ...`; None if it can."""
        ...

    def forward(
        self,
        problem: Problem,
        values: Float[Array, " T"],
        weights: Float[Array, " T"] | None,
        offsets: Int[Array, " R1"],
    ) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
        """Sums, and how many tokens each is of: float32; float64 of float64 values."""
        ...

    def backward(
        self,
        problem: Problem,
        values: Float[Array, " T"] | None,
        weights: Float[Array, " T"] | None,
        offsets: Int[Array, " R1"],
        dsums: Float[Array, " R"],
    ) -> tuple[Float[Array, " T"], Float[Array, " T"] | None]:
        """The gradient of the values and, where `values` is given, of the weights.

        `dsums` is as wide as `forward`'s sums; each gradient as what it is of.
        """
        ...


def gpu_reason(problem: Problem, capability: tuple[int, int]) -> str | None:
    """Why a kernel for NVIDIA GPUs from `capability` on cannot do this, if so."""
    device = problem.device
    if device.capability is None or device.capability < capability:
        least = ".".join(map(str, capability))
        return f"needs a GPU of compute capability {least} or newer; this is {device}"
    return dtype_reason(problem)


def dtype_reason(problem: Problem) -> str | None:
    """Why a kernel cannot do this with values and weights of these dtypes, if so."""
    for name, dtype in (("values", problem.dtype), ("weights", problem.weights_dtype)):
        if dtype is not None and str(dtype) not in _KERNEL_DTYPES:
            return f"needs {', '.join(_KERNEL_DTYPES)}; {name} is {dtype}"
    return None


_choice = Choice[SumsBackend]("sequence_sums", BACKENDS)
load_backend = _choice.load
check_name = _choice.check_name
