"""Which process of a run this is: as it was told, or as the environment says."""

import os
import warnings
from typing import NamedTuple

from engine.errors import InputError, stage
from engine.parallel.meeting import Place

TIMEOUT = 300.0  # seconds, in which all processes must have come
_BY_HAND = (
    "give all of --coordinator HOST:PORT --num-processes N --process-id I, or "
    "--num-processes 1"
)


class Launch(NamedTuple):
    """Where a process finds the others; what is None is looked for by JAX.

    Cloud TPUs, SLURM, Open MPI and Kubernetes say it in the environment.
    """

    coordinator: str | None = None  # HOST:PORT of process 0
    num_processes: int | None = None  # 1: one process, whatever the environment says
    process_id: int | None = None
    timeout: float = TIMEOUT


def find_place(launch: Launch) -> tuple[Place, list[int] | None] | None:
    """Where this process is, and which devices are its own, if it is one of several."""
    if launch.num_processes == 1:
        return None
    given = (
        launch.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        launch.num_processes,
        launch.process_id,
    )
    # JAX's own detection has no other name; `jax.distributed.initialize` would end this
    # process where nobody answers.
    from jax._src.clusters import ClusterEnv

    with (
        warnings.catch_warnings(action="ignore"),  # of what is not installed for it
        stage("the processes of this run cannot be found in the environment", _BY_HAND),
    ):
        address, processes, process, ids = (
            ClusterEnv.auto_detect_unset_distributed_params(
                *given, None, None, int(launch.timeout)
            )
        )
    if processes == 1:
        return None
    if address is None or processes is None or process is None:
        if given == (None, None, None):
            return None
        raise InputError(
            "the environment (SLURM, Open MPI, Kubernetes, Cloud TPU) does not say "
            f"where this process is; {_BY_HAND}"
        )
    if ids is None or "JAX_LOCAL_DEVICE_IDS" in os.environ:  # which JAX reads itself
        return Place(process, processes, address), None
    return Place(process, processes, address), list(ids)
