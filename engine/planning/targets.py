"""Devices that a step can be planned for, by the words of a user: `v5e:4x4`, `h200:8`.

Nothing here imports JAX: what a target needs of the environment comes before that.

Peak rates and bandwidths are the makers' own. Sources:

- Cloud TPU on v5e, v5p, v6e and TPU7x (docs.cloud.google.com/tpu/docs/v5e and so on):
  peak bfloat16 197, 459, 918 and 2,307 TFLOP/s a chip; memory 800, 2,765, 1,600 and
  7,380 GB/s (jax/_src/tpu_info.py has 819 and 1,640 for v5e and v6e, which are used).
- Their interconnect, of all links and both directions together: 200, 1,200, 400 and
  1,200 GB/s a chip, over 4, 6, 4 and 6 links. A collective along an axis that lies on
  one axis of the torus uses two links, each one way: half of (2 / links) of that for
  each way, so 100, 400, 200 and 400 GB/s into a device. Slices that do not wrap around,
  and axes that lie across several of the torus, differ: by up to two, either way.
- NVIDIA's data sheets of H100 SXM and H200: 989 TFLOP/s, 3.35 and 4.8 TB/s, and NVLink
  of 900 GB/s, which is 450 GB/s each way.

What a program may use of a TPU's memory is what the compiler itself (libtpu 0.0.48)
says where it refuses one. Of a GPU's it is JAX's share, XLA_PYTHON_CLIENT_MEM_FRACTION
or 0.75, of what the target file says that the driver reports.
"""

import math
import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import InputError

_GIB = 2**30
_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
_DEFAULT_SHARE = 0.75  # JAX's own
_NVLINKED = 8  # GPUs of one host
_CHIPS_OF_A_HOST = 4  # TPUs', in a row


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A kind of JAX device; see the module for where its numbers come from."""

    name: str  # as people call it
    platform: str  # of JAX: tpu, cuda or cpu
    memory_bytes: int  # that a program may use; of a GPU: in all
    flops_per_s: float  # bfloat16, dense
    bytes_per_s: float  # of its memory
    link_bytes_per_s: float  # into a device, in a collective along one axis
    compiler: str  # the package that holds it


def _tpu(name: str, gib: float, flops: float, memory: float, link: float) -> Chip:
    return Chip(
        name=name,
        platform="tpu",
        memory_bytes=int(gib * _GIB),
        flops_per_s=flops,
        bytes_per_s=memory,
        link_bytes_per_s=link,
        compiler="libtpu",
    )


def _hopper(name: str, memory_bytes: int, memory: float) -> Chip:
    return Chip(
        name=name,
        platform="cuda",
        memory_bytes=memory_bytes,
        flops_per_s=989e12,
        bytes_per_s=memory,
        link_bytes_per_s=450e9,
        compiler="jax-cuda13-plugin",
    )


# A TPU7x chip is two JAX devices, each with half of it.
CHIPS = {
    "v5e": _tpu("TPU v5e", 15.75, 197e12, 819e9, 100e9),
    "v5p": _tpu("TPU v5p", 95.74, 459e12, 2765e9, 400e9),
    "v6e": _tpu("TPU v6e", 31.25, 918e12, 1640e9, 200e9),
    "tpu7x": _tpu("TPU7x", 94.75, 1153.5e12, 3690e9, 200e9),
    "h100": _hopper("NVIDIA H100", 85_000_000_000, 3350e9),
    "h200": _hopper("NVIDIA H200", 150_000_000_000, 4800e9),
    # Of a CPU nobody says what it can do: its memory alone is known.
    "cpu": Chip(
        name="CPU",
        platform="cpu",
        memory_bytes=0,
        flops_per_s=0.0,
        bytes_per_s=0.0,
        link_bytes_per_s=0.0,
        compiler="jaxlib",
    ),
}
EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:4x4, tpu7x:2x2x1, h100:8, h200:8, cpu:1"


@dataclass(frozen=True, kw_only=True)
class Target:
    """So many devices of one kind, and how they are connected."""

    text: str  # as given
    chip: Chip
    count: int  # of JAX devices
    sizes: tuple[int, ...]  # of a TPU slice in chips; else (count,)

    @property
    def topology(self) -> dict[str, Any]:
        """What `jax.experimental.topologies.get_topology_desc` is asked for."""
        if self.chip.platform == "tpu":
            asked: dict[str, Any] = {"platform": "tpu", "topology_name": self.text}
            if 1 in self.sizes[:2] and math.prod(self.sizes) <= _CHIPS_OF_A_HOST:
                # Not a whole host's 2x2, which are taken for granted.
                asked["chips_per_host_bounds"] = (*self.sizes, 1)[:3]
            return asked
        config = Path(__file__).with_name(f"{self.text.partition(':')[0]}.textproto")
        return {
            "platform": "cuda",
            "topology_name": "",
            "topology": f"1x1x{_NVLINKED}",
            "target_config": config.read_text(),
        }

    @property
    def environment(self) -> dict[str, str | None]:
        """What must be set, or (None) not set, before JAX is imported."""
        if self.chip.platform == "tpu":
            return {
                "TPU_SKIP_MDS_QUERY": "1",
                "JAX_PLATFORMS": "cpu",
                # It compiles only, and so takes nothing from another process.
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                # Nor does it look for, or complain of, a TPU and its other hosts.
                "TPU_ACCELERATOR_TYPE": "v5litepod-4",
                "TPU_WORKER_HOSTNAMES": "localhost",
            }
        if self.chip.platform == "cuda":
            # A GPU that is here is left alone.
            return {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": "cpu"}
        return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.count)}

    @property
    def capacity(self) -> int:
        """Bytes of each device that a run can have."""
        if self.chip.platform == "tpu":
            return self.chip.memory_bytes
        if self.chip.platform == "cuda":
            return int(memory_share() * self.chip.memory_bytes)
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages // self.count

    @property
    def capacity_words(self) -> str:
        """Where `capacity` comes from."""
        if self.chip.platform == "tpu":
            return "what its compiler lets a program use"
        if self.chip.platform == "cuda":
            return f"{memory_share():g} of its memory, JAX's share ({_SHARE})"
        return "this machine's memory"


def memory_share() -> float:
    """Of a GPU's memory, what JAX takes for a process.

    Raises:
        InputError: a value of the environment variable that is no share.
    """
    text = os.environ.get(_SHARE) or str(_DEFAULT_SHARE)
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(
            f"{_SHARE}={text!r} is no share of a GPU's memory; give a number above 0 "
            "and up to 1, or unset it"
        )
    return share


def parse_target(text: str) -> Target:
    """The target that a user means.

    Raises:
        InputError: a device that is not known, or a number of them that cannot be.
    """
    name, colon, shape = text.partition(":")
    chip = CHIPS.get(name.lower())
    if chip is None:
        raise InputError(
            f"--target {text!r}: there is no device {name!r} to plan for; give one of "
            f"{', '.join(CHIPS)} and how many, such as {EXAMPLES}"
        )
    if chip.platform == "tpu":
        return _tpu_slice(text, name.lower(), chip, shape)
    if not colon:
        shape = "1"
    if not re.fullmatch("[1-9][0-9]{0,4}", shape):
        raise InputError(
            f"--target {text!r}: {shape!r} is no number of devices; write "
            f"{name.lower()}:1 or {name.lower()}:8"
        )
    count = int(shape)
    if chip.platform == "cuda" and count > _NVLINKED:
        raise InputError(
            f"--target {text!r}: one host has at most {_NVLINKED} of them, and several "
            f"hosts are not planned for; give {name.lower()}:{_NVLINKED} or less"
        )
    return Target(
        text=f"{name.lower()}:{count}", chip=chip, count=count, sizes=(count,)
    )


def _tpu_slice(text: str, name: str, chip: Chip, shape: str) -> Target:
    dimensions = 2 if name in ("v5e", "v6e") else 3
    example = "4x4" if dimensions == 2 else "2x2x1"
    if not re.fullmatch(r"[1-9]\d{0,2}" + r"x[1-9]\d{0,2}" * (dimensions - 1), shape):
        raise InputError(
            f"--target {text!r}: {shape!r} is no slice of {chip.name}, which has "
            f"{dimensions} dimensions; write them as {name}:{example}"
        )
    sizes = tuple(map(int, shape.split("x")))
    devices = math.prod(sizes) * (2 if name == "tpu7x" else 1)
    return Target(text=f"{name}:{shape}", chip=chip, count=devices, sizes=sizes)


def apply_environment(
    wanted: Mapping[str, str | None], environment: MutableMapping[str, str]
) -> None:
    """Set and unset variables, in place."""
    for name, value in wanted.items():
        if value is None:
            environment.pop(name, None)
        else:
            environment[name] = value
