"""What the compilers of a run's steps are told."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from engine.errors import InputError, one_line

# Without this the compiler may keep more digits than bfloat16 has wherever it fuses,
# and fuses the policy's forward otherwise than the reference's: their difference would
# start further from 0 than rounding explains.
_ROUNDS_AS_WRITTEN = {"xla_allow_excess_precision": False}

# A TPU's SparseCores can gather and add up while its TensorCores, which otherwise wait,
# go on. libtpu 0.0.48 has them do it on TPU7x by itself, along one axis of the torus.
_BY_SPARSE_CORES = (
    "xla_tpu_enable_sparse_core_collective_offload_all_gather",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather",
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
    "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter",
    # Along three axes of the torus libtpu gathers by adding up, which they cannot do.
    "xla_tpu_prefer_async_allgather_to_allreduce",
)
_WITH_SPARSE_CORES = ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e", "TPU7x")
# What elsewhere lets exchanges run beside products, unless it is told not to.
_OTHERWISE = {
    "tpu": "xla_tpu_enable_async_collective_fusion",
    "gpu": "xla_gpu_enable_latency_hiding_scheduler",
}

# In the order that it takes by itself a CPU has gradients of 0 from the forward on. (Of
# several devices each could come to collectives in another order then, and wait.)
_OF_ONE_CPU = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


def compiler_options(mesh: Mesh, *, overlap: bool) -> dict[str, Any]:
    """XLA's options, by name, for a step on the devices of a mesh.

    overlap: exchanges between devices run beside computation, as far as these can.
    """
    options: dict[str, Any] = dict(_ROUNDS_AS_WRITTEN)
    device = mesh.devices.flat[0]
    if mesh.size == 1:
        return options | _OF_ONE_CPU if device.platform == "cpu" else options
    if device.device_kind in _WITH_SPARSE_CORES:
        options |= dict.fromkeys(_BY_SPARSE_CORES, overlap)
    elif not overlap and device.platform in _OTHERWISE:
        options[_OTHERWISE[device.platform]] = False
    return options


@contextlib.contextmanager
def known_options() -> Iterator[None]:
    """Says in one line what to do about a compiler that is too old, or too new.

    Raises:
        InputError: in place of the compiler's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        raise InputError(
            "the compiler of this run's devices does not know an option that steps are "
            f"compiled with ({one_line(error)}); install the versions that "
            "constraints.txt names: of jax, and of libtpu on TPUs"
        ) from error
