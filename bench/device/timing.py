"""Times of several candidates, taken in turns. Imports neither JAX nor torch.

A time is that of `iterations` calls between two waits for the device, over their
number, so that queueing a call costs nothing while the one before runs. Candidates take
turns in an order that moves on by one each round: clocks that rise and fall meet all of
them alike. Inputs are the same in every call; the head alone is larger than any cache.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.device.plan import Plan
from bench.device.subject import Subject

MOST_ITERATIONS = 200
Call = Callable[[], Any]  # queues the work, returns what to wait for
Wait = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one call, an entry for each round."""

    seconds: tuple[float, ...]
    iterations: int

    @property
    def median(self) -> float:
        """The time that a row reports."""
        return statistics.median(self.seconds)

    def fields(self) -> dict[str, Any]:
        """What a row has beside the median."""
        low, high = min(self.seconds), max(self.seconds)
        return {
            "min_ms": float(f"{1e3 * low:.4g}"),
            "spread": float(f"{(high - low) / self.median:.2g}"),
            "rounds": len(self.seconds),
            "iterations": self.iterations,
        }


def seconds_of(call: Call, wait: Wait, iterations: int) -> float:
    """Of one call, over `iterations` of them."""
    start = time.perf_counter()
    out = None
    for _ in range(iterations):
        out = None  # its memory is free for the next call's results
        out = call()
    wait(out)
    return (time.perf_counter() - start) / iterations


def take_turns(
    calls: Mapping[Subject, Call],
    wait: Wait,
    plan: Plan,
    trying: Callable[[Subject], None],
) -> dict[Subject, Times]:
    """Times of each; `trying` is told whose turn it is."""
    iterations = {}
    for name, call in calls.items():
        trying(name)
        wait(call())  # loads the program
        once = seconds_of(call, wait, 1)
        iterations[name] = max(1, min(MOST_ITERATIONS, round(plan.slice_s / once)))
    start = time.perf_counter()
    while time.perf_counter() - start < plan.settle_s:
        for name, call in calls.items():
            trying(name)
            seconds_of(call, wait, iterations[name])
    order = list(calls)
    seconds: dict[Subject, list[float]] = {name: [] for name in calls}
    for _ in range(plan.rounds):
        order.append(order.pop(0))
        for name in order:
            trying(name)
            took = seconds_of(calls[name], wait, iterations[name])
            seconds[name].append(took)
    return {
        name: Times(seconds=tuple(seconds[name]), iterations=iterations[name])
        for name in calls
    }
