"""The device that a computation is being traced for, which need not be here."""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax

# Compute capability by the name that the driver reports, for devices that are compiled
# for but absent; a present one is asked. A longer name wins: GH200 is not an H200.
_CAPABILITIES = {
    "V100": (7, 0),
    "T4": (7, 5),
    "A100": (8, 0),
    "A10": (8, 6),
    "A10G": (8, 6),
    "A40": (8, 6),
    "RTX A6000": (8, 6),
    "L4": (8, 9),
    "L40": (8, 9),
    "L40S": (8, 9),
    "RTX 4090": (8, 9),
    "H100": (9, 0),
    "H200": (9, 0),
    "H800": (9, 0),
    "GH200": (9, 0),
    "B200": (10, 0),
    "GB200": (10, 0),
    "B300": (10, 3),
    "GB300": (10, 3),
    "RTX PRO 6000": (12, 0),
    "RTX 5090": (12, 0),
}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a GPU's maker says of it, for choices before anything is measured."""

    cores: int  # streaming multiprocessors
    flops_per_s: float  # of dense products of bfloat16 or float16
    bytes_per_s: float  # of its memory


# The module with the fastest memory of that name.
_SPEEDS = {
    "A100": Speed(cores=108, flops_per_s=312e12, bytes_per_s=2.04e12),
    "L40S": Speed(cores=142, flops_per_s=362e12, bytes_per_s=0.86e12),
    "H100": Speed(cores=132, flops_per_s=989e12, bytes_per_s=3.35e12),
    "H800": Speed(cores=132, flops_per_s=989e12, bytes_per_s=3.35e12),
    "H200": Speed(cores=132, flops_per_s=989e12, bytes_per_s=4.8e12),
    "GH200": Speed(cores=132, flops_per_s=989e12, bytes_per_s=4.9e12),
    "B200": Speed(cores=148, flops_per_s=2250e12, bytes_per_s=8.0e12),
}
# Of one that is not known: as much arithmetic to a byte as the others.
_TYPICAL = Speed(cores=100, flops_per_s=500e12, bytes_per_s=2.0e12)
# Where a device that is here says how many it has.
_CORES = {"gpu": "core_count", "tpu": "num_cores"}


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the choice of a kernel and of its blocks depends on."""

    platform: str  # cpu, gpu (NVIDIA's), rocm or tpu
    kind: str  # as the driver names it: NVIDIA H200, TPU v6e
    num_cores: int | None = None  # streaming multiprocessors of a GPU, cores of a TPU
    capability: tuple[int, int] | None = None  # of an NVIDIA GPU; None where unknown

    def __str__(self) -> str:
        """The kind, with the compute capability of an NVIDIA GPU, or the platform."""
        if self.capability is None:
            named = self.platform in self.kind.lower()
            return self.kind if named else f"{self.kind} ({self.platform})"
        return f"{self.kind} (compute capability {'.'.join(map(str, self.capability))})"


_pretended: ContextVar["Device | None"] = ContextVar("pretended", default=None)


@contextlib.contextmanager
def pretended(device: Device) -> Iterator[None]:
    """`traced_device` is this one: its kernels are to be interpreted."""
    token = _pretended.set(device)
    try:
        yield
    finally:
        _pretended.reset(token)


def traced_device() -> Device:
    """The device of the mesh being traced, else the default one.

    The mesh comes first, so that compiling ahead of time for an absent device picks
    what that device will run.
    """
    found = _pretended.get()
    if found is not None:
        return found
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        kind, platform = str(abstract.device_kind), str(abstract.platform)
        return _device(platform, kind, abstract.num_cores, None)
    return of_jax(jax.local_devices(backend=jax.default_backend())[0])


def of_jax(device: Any) -> Device:
    """One of JAX's devices, which need not be here."""
    return _device(
        # The platform of a CUDA device is called gpu; only its client's name tells.
        device.client.platform_version if device.platform == "gpu" else device.platform,
        device.device_kind,
        getattr(
            device, "core_count" if device.platform == "gpu" else "num_cores", None
        ),
        getattr(device, "compute_capability", None),
    )


def _device(
    platform: str, kind: str, num_cores: int | None, capability: str | None
) -> Device:
    if "rocm" in platform.lower():
        return Device(platform="rocm", kind=kind, num_cores=num_cores)
    if platform in ("cpu", "tpu"):
        return Device(platform=platform, kind=kind, num_cores=num_cores)
    if capability is not None:
        major, minor = map(int, str(capability).split("."))
        known: tuple[int, int] | None = major, minor
    else:
        known = capability_of(kind)
    return Device(platform="gpu", kind=kind, num_cores=num_cores, capability=known)


def capability_of(kind: str) -> tuple[int, int] | None:
    """The compute capability of an NVIDIA GPU by its name; None for an unknown one."""
    return _by_name(_CAPABILITIES, kind)


def gpu_speed(device: Device) -> Speed:
    """By its name, which need not be known."""
    return _by_name(_SPEEDS, device.kind) or _TYPICAL


def known_gpus() -> dict[str, Device]:
    """Absent ones that a choice can be looked at for, by their names in lower case."""
    return {
        name.lower(): Device(
            platform="gpu",
            kind=f"NVIDIA {name}",
            num_cores=speed.cores,
            capability=_CAPABILITIES[name],
        )
        for name, speed in _SPEEDS.items()
    }


def _by_name[Value](table: Mapping[str, Value], kind: str) -> Value | None:
    """Of the longest name that is a word of the kind."""
    words = f" {kind.replace('-', ' ')} "
    found = [name for name in table if f" {name} " in words]
    return table[max(found, key=len)] if found else None
