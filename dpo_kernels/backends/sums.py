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

import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_kernels.devices import Device

# The order in which `auto` tries them: that of `token_logprobs`.
BACKENDS = {
    "mosaic_gpu": "dpo_kernels.backends.sums_mosaic_gpu",
    "triton": "dpo_kernels.backends.sums_triton",
    "pallas_tpu": "dpo_kernels.backends.sums_pallas_tpu",
    "xla": "dpo_kernels.backends.sums_xla",
}
_KERNEL_DTYPES = ("float32", "bfloat16", "float16")

_log = logging.getLogger(__name__)


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
        """Sums, and how many tokens each is of, in float32 or wider."""
        ...

    def backward(
        self,
        problem: Problem,
        values: Float[Array, " T"] | None,
        weights: Float[Array, " T"] | None,
        offsets: Int[Array, " R1"],
        dsums: Float[Array, " R"],
    ) -> tuple[Float[Array, " T"], Float[Array, " T"] | None]:
        """The gradient of the values and, where `values` is given, of the weights."""
        ...


def gpu_reason(problem: Problem, capability: tuple[int, int]) -> str | None:
    """Why a kernel for NVIDIA GPUs from `capability` on cannot do this, if so."""
    device = problem.device
    if device.capability is None or device.capability < capability:
        least = ".".join(map(str, capability))
        return f"needs a GPU of compute capability {least} or newer; this is {device}"
    for name, dtype in (("values", problem.dtype), ("weights", problem.weights_dtype)):
        if dtype is not None and str(dtype) not in _KERNEL_DTYPES:
            return f"needs {', '.join(_KERNEL_DTYPES)}; {name} is {dtype}"
    return None


def load_backend(implementation: str, problem: Problem) -> SumsBackend:
    """The backend of that name, if it can do this; `auto` takes the first that can.

    Raises:
        ValueError: a name that is not in `BACKENDS`.
        NotImplementedError: a backend that does not cover the device or the dtypes.
    """
    if implementation == "auto":
        return _resolve_auto(problem)
    check_name(implementation)
    reason = _module(implementation).unsupported(problem)
    if reason is not None:
        others = [n for n in BACKENDS if _module(n).unsupported(problem) is None]
        raise NotImplementedError(
            f"{implementation=} {reason}; use {' or '.join((*others, 'auto'))}"
        )
    return _module(implementation)


def check_name(implementation: str) -> None:
    """Refuse a name that is neither `auto` nor in `BACKENDS`."""
    if implementation not in ("auto", *BACKENDS):
        raise ValueError(
            f"{implementation=} is unknown; use one of: auto, {', '.join(BACKENDS)}"
        )


def _resolve_auto(problem: Problem) -> SumsBackend:
    passed_over = []
    for name in BACKENDS:
        reason = _module(name).unsupported(problem)
        if reason is None:
            _log_choice(name, problem.device, tuple(passed_over))
            return _module(name)
        passed_over.append(f"{name} {reason}")
    raise AssertionError("xla runs anywhere")


@functools.cache
def _log_choice(name: str, device: Device, passed_over: tuple[str, ...]) -> None:
    because = f" ({'; '.join(passed_over)})" if passed_over else ""
    _log.info(
        "sequence_sums: implementation='auto' is %r on %s%s", name, device, because
    )


def _module(name: str) -> SumsBackend:
    return cast(SumsBackend, importlib.import_module(BACKENDS[name]))
