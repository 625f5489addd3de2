"""The devices of a target, which need not be here, as JAX knows them."""

from importlib.util import find_spec
from typing import Any

import jax
from jax.experimental import topologies

from engine.errors import InputError, stage
from engine.planning.targets import Target

_MODULES = {"tpu": "libtpu", "cuda": "jax_cuda13_plugin"}


def devices_of(target: Target) -> list[Any]:
    """The target's devices, in the order in which a mesh is made of them.

    Raises:
        InputError: the compiler for them is not installed; a slice that there is none
            of; an environment that JAX has read already and that is another target's.
    """
    platform = target.chip.platform
    if platform == "cpu":
        found = jax.devices("cpu")
        if len(found) < target.count:
            raise InputError(
                f"--target {target.text}: JAX has {len(found)} CPU devices in this "
                "process; unset JAX_NUM_CPU_DEVICES and XLA_FLAGS, or ask for fewer"
            )
        return found[: target.count]
    if find_spec(_MODULES[platform]) is None:
        raise InputError(
            f"--target {target.text}: the compiler for {target.chip.name} is not "
            f"installed; pip install {target.chip.compiler}, which needs no such device"
        )
    with stage(
        f"--target {target.text}: its compiler cannot be used",
        "give a slice that there is, or install the compiler of this jax's version",
    ):
        described = topologies.get_topology_desc(**target.topology)
    return list(described.devices)[: target.count]
