"""Transfers to and from HBM, and the flags that they count up: a core's DMA engine.

A transfer adds its size to a flag when it ends; a kernel waits for the flag to hold
that much and takes it off again. All transfers share HBM's bandwidth in the order in
which they start.
"""

from collections import defaultdict
from dataclasses import dataclass

from bench.tpu.bundles import ScheduleError

GRANULE = 32  # bytes, the unit of sizes and of what flags count


@dataclass(frozen=True, kw_only=True)
class Memory:
    """HBM as one core sees it."""

    bytes_per_cycle: float
    latency: float  # cycles from a transfer's start to its end, besides its bytes


class Transfers:
    """What is under way; times are in cycles."""

    def __init__(self, memory: Memory):
        self.memory = memory
        self.read_bytes = self.written_bytes = self.number = 0
        self._free = 0.0  # when HBM has nothing more to do
        self._flags: dict[int, int] = defaultdict(int)
        self._ended: set[int] = set()  # flags that the kernel is done with
        self._coming: dict[int, list[tuple[float, int]]] = defaultdict(list)

    def start(
        self, time: float, granules: int, flag: int, source: str, target: str
    ) -> None:
        """A transfer between `hbm` and `vmem` or `smem`."""
        size = GRANULE * granules
        reads, writes = source.startswith("hbm"), target.startswith("hbm")
        self.number += 1
        self.read_bytes += size * reads
        self.written_bytes += size * writes
        cycles = (reads + writes) * size / self.memory.bytes_per_cycle
        self._free = max(time, self._free) + cycles
        self._coming[flag].append((self._free + self.memory.latency, granules))

    def wait(self, time: float, flag: int, amount: int) -> float:
        """When the flag holds the amount, at the earliest `time`.

        Raises:
            ScheduleError: nothing under way makes it so.
        """
        coming = sorted(self._coming[flag])
        while self._flags[flag] < amount:
            if not coming:
                raise ScheduleError("a wait for a transfer that nobody started")
            end, granules = coming.pop(0)
            self._flags[flag] += granules
            time = max(time, end)
        self._coming[flag] = coming
        return time

    def add(self, flag: int, amount: int) -> None:
        """Count a flag up or down."""
        self._flags[flag] += amount

    def set(self, flag: int, amount: int) -> None:
        """Set a flag: to 0 when a kernel begins, to 1 when it is done with it."""
        if amount and self._flags[flag]:
            return  # something is left in it, which `check` will find
        self._flags[flag] = amount
        (self._ended.add if amount else self._ended.discard)(flag)

    def check(self) -> None:
        """At a kernel's end.

        Raises:
            ScheduleError: a transfer was not waited for, so that the control flow was
                not the kernel's.
        """
        left = [f for f, x in self._flags.items() if x and f not in self._ended]
        if left or any(self._coming.values()):
            raise ScheduleError("transfers that nobody waited for")
