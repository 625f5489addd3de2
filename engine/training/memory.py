"""What the devices say of their memory, and a compiler of what its program takes."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jax.sharding import Mesh

from engine.parallel import processes


def memory_metrics(mesh: Mesh) -> dict[str, float]:
    """The most that a device of this process has held so far, in bytes; see below."""
    return fullest(device.memory_stats() for device in mesh.local_devices)


def fullest(stats: Iterable[Mapping[str, int] | None]) -> dict[str, float]:
    """The metrics, of what each device says: the largest peak, the smallest limit.

    A device that does not count, such as a CPU, is left out: none, and there is no
    metric.
    """
    found = [one for one in stats if one]
    peaks = [one["peak_bytes_in_use"] for one in found if "peak_bytes_in_use" in one]
    limits = [one["bytes_limit"] for one in found if one.get("bytes_limit")]
    metrics: dict[str, float] = {}
    if peaks:
        metrics["memory/peak_bytes"] = max(peaks)
    if peaks and limits:
        metrics["memory/limit_bytes"] = min(limits)
    return metrics


def limit_bytes(mesh: Mesh) -> int | None:
    """What the smallest device of all processes has, in bytes; None: not known."""
    found = [device.memory_stats() or {} for device in mesh.local_devices]
    least = min(one.get("bytes_limit", 0) for one in found)
    return min(processes.gather(least)) or None


class Taken(NamedTuple):
    """Bytes of a device that a compiled program takes, by its compiler's account."""

    held: int  # what it is given and returns, once where it is donated, and its code
    temporary: int  # besides, at most at once

    @property
    def peak(self) -> int:
        """Both."""
        return self.held + self.temporary


def taken_by(compiled: Any, platform: str) -> Taken | None:
    """What a program takes; None: the compiler does not say.

    A TPU's compiler counts more temporaries than are ever there at once, and says the
    peak as well, with what is in the host's memory in it: arguments, which are there
    throughout, and temporaries, of which this is a bound then. Elsewhere a program has
    all of its temporaries from its start.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    held += memory.generated_code_size_in_bytes - memory.alias_size_in_bytes
    temporary = memory.temp_size_in_bytes
    peak = memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes
    if platform == "tpu" and peak > held:
        temporary = min(peak - held, temporary)
    return Taken(held, temporary)
