"""Launches Triton kernels through jax-triton, whichever of its versions is there."""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array

from dpo_kernels.op.devices import traced_device
from dpo_kernels.op.loops import make_varying, varying_axes


def missing_package() -> str | None:
    """Why nothing can be launched, as `needs ...`; None where jax-triton is there."""
    if importlib.util.find_spec("jax_triton") is not None:
        return None
    return (
        "needs the package jax-triton, which is not installed "
        "(pip install 'dpo-engine[cuda13]')"
    )


def launch(
    kernel: Any,
    arrays: Sequence[Array],
    out: tuple[jax.ShapeDtypeStruct, ...],
    programs: int,
    **options: Any,
) -> tuple[Array, ...]:
    """Run so many programs: inputs, then outputs, then the constants in `options`."""
    call, out_argument = triton_call()
    capability = traced_device().capability
    assert capability is not None, "`unsupported` asks for it"
    results = call(
        *arrays,
        kernel=kernel,
        grid=(programs,),
        compute_capability=10 * capability[0] + capability[1],
        **{out_argument: out},
        **options,
    )
    # jax-triton does not say over which mesh axes its results vary.
    axes = varying_axes(*arrays)
    return tuple(make_varying(x, axes) for x in results)


@functools.cache
def triton_call() -> tuple[Callable[..., Any], str]:
    """jax-triton's entry point, and its name for the argument of output types."""
    import jax_triton

    call = jax_triton.triton_call
    if "out_type" not in inspect.signature(call).parameters:
        return call, "out_shape"  # jax-triton before 0.4
    # Triton from 3.8 on writes a newer PTX than what comes with CUDA 13.0 can read.
    options = {"ptx_version": 90, "enable_fp_fusion": True}
    return functools.partial(call, backend_options=options), "out_type"
