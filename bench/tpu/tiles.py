"""The plain tiles' attention for `bench.tpu.splash_blocks`: XLA's programs, two ways.

Each has a loop over tiles of queries and in it one over tiles of keys, whose length is
in the data: causality makes n (n + 1) / 2 turns of it over n tiles, and so often each
operation in it is counted. Beside that a time is

- `schedule`: the cycles of each operation's schedule, followed as a kernel's are, one
  operation after another with no time between them. Less than that it cannot be: what
  starting an operation takes is not in it, and a turn is eight to twenty of them.
- `estimate`: the cycles that XLA itself writes beside each operation
  (`estimated_cycles`), some 2,100 of them where it does next to nothing.

An operation whose schedule cannot be followed counts with the estimate in both.
"""

import re
from collections.abc import Mapping
from typing import Any

from bench import rows
from bench.tpu import splash
from bench.tpu.bundles import ScheduleError
from bench.tpu.chips import CHIPS
from bench.tpu.compile import Compiled, Dump, Job, compile_elsewhere
from bench.tpu.model import calls, read, simulate
from bench.tpu.predict import row_of
from bench.tpu.programs import Program, ProgramError

PRODUCTS = {"forward": 2, "backward": 5}


def turns(length: int, tile: int) -> int:
    """Of the inner loop: tiles of keys that tiles of queries see."""
    tiles = -(-length // tile)
    return tiles * (tiles + 1) // 2


def _program(
    which: str, T: int, D: int, dtype: str, options: dict[str, Any]
) -> Program:
    import jax

    from engine.models.attention import tiles

    K, H = int(options.pop("K", 8)), int(options.pop("H", 128))
    if D % (K * H):
        raise ProgramError(f"D={D} is not a number of query heads of K={K} times H={H}")
    query = jax.ShapeDtypeStruct((1, T, D // H, H), dtype)
    key = jax.ShapeDtypeStruct((1, T, K, H), dtype)

    function, arguments = splash.half(
        which == "forward",
        lambda *x: tiles.attend(*x, scale=H**-0.5),
        (query, key, key),
    )
    return Program(
        function=function,
        arguments=arguments,
        flops=PRODUCTS[which] * 2 * D * splash.pairs(T, T),
        unknown_loop_runs=turns(T, tiles.TILE),
    )


def forward(
    generation: str, T: int, D: int, V: int, dtype: str, options: dict[str, Any]
) -> Program:
    """What attention gives, and the logarithms of its sums."""
    del generation, V
    return _program("forward", T, D, dtype, options)


def backward(
    generation: str, T: int, D: int, V: int, dtype: str, options: dict[str, Any]
) -> Program:
    """All gradients."""
    del generation, V
    return _program("backward", T, D, dtype, options)


def predict(job: Job) -> rows.Row:
    """A row; `ms` is the schedules' time, `estimate_ms` XLA's.

    Raises:
        ProgramError: it does not compile.
    """
    return follow(job, compile_elsewhere(job))


def follow(job: Job, compiled: Compiled) -> rows.Row:
    """As `predict`, of what is compiled already."""
    facts, chip = compiled.facts, CHIPS[job.generation]
    estimates = facts["estimated_cycles"]
    every = {name: facts["trips"].get(name, 1) for name in estimates}
    estimate = sum(every[name] * cycles for name, cycles in estimates.items())
    found, skipped = _cycles(compiled.schedules, job, facts["trips"], estimates)
    return row_of(
        job,
        seconds=sum(n * cycles for n, cycles in found.values()) / chip.hertz,
        flops=facts["flops"],
        peak_tflops=chip.peak_tflops,
        compiler=facts["compiler"],
        estimate_ms=round(1e3 * estimate / chip.hertz, 4),
        operations=sum(n for n, _ in found.values()),
        not_timed=skipped,
        temp_bytes=facts["temp_bytes"],
    )


def _cycles(
    schedules: Mapping[str, Dump],
    job: Job,
    trips: Mapping[str, int],
    estimates: Mapping[str, int],
) -> tuple[dict[str, tuple[int, float]], dict[str, str]]:
    """Operation -> its runs and the cycles of one; and those not followed, with why."""
    chip = CHIPS[job.generation]
    count = calls(schedules["TLP"].bundles, trips)
    found: dict[str, tuple[int, float]] = {}
    skipped: dict[str, str] = {}
    for dump in schedules.values():
        entry = re.search(r"entry bundle: %([\w.-]+) = ", dump.bundles)
        if not entry:
            continue  # the program itself, and what surrounds it
        name = entry[1]
        try:
            cycles = max(x.cycles for x in simulate(read(dump, name), chip))
        except ScheduleError as error:
            skipped[name], cycles = str(error), estimates.get(name, 0)
        found[name] = count[name], cycles
    return found, skipped
