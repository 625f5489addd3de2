"""What the devices say of their memory."""

from collections.abc import Iterable, Mapping

from jax.sharding import Mesh


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
