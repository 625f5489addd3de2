"""From the final schedules of a compiled program to a predicted time."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.tpu.blocks import Block, Core, Run
from bench.tpu.bundles import Schedule, ScheduleError, parse
from bench.tpu.chips import Chip
from bench.tpu.compile import Dump
from bench.tpu.delays import cycles_of_bundles
from bench.tpu.simulator import Simulator
from bench.tpu.transfers import Memory

# From a transfer's start to its arrival, besides its bytes.
HBM_LATENCY_S = 1e-6
# Launching an operation: fetching its instructions, setting up.
LAUNCH_S = 2e-6
# A loop of this many bundles is long: the jump back finds its start no longer fetched.
FAR = 1024


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation of a program, simulated on every core of a device."""

    name: str
    pallas: bool
    calls: int
    chip: Chip
    runs: tuple[Run, ...]  # by core

    @property
    def run(self) -> Run:
        """The core that takes longest."""
        return max(self.runs, key=lambda run: run.cycles)

    @property
    def seconds(self) -> float:
        """Of one call."""
        return self.run.cycles / self.chip.hertz + LAUNCH_S

    @property
    def matmul_flop(self) -> int:
        """That the matrix instructions of one call do, all cores together."""
        rows = sum(b.matmul_rows * b.visits for run in self.runs for b in run.blocks)
        return rows * self.chip.row_flop

    @property
    def hbm_bytes(self) -> int:
        """Of one call, all cores together."""
        return sum(run.read_bytes + run.written_bytes for run in self.runs)

    @property
    def steps(self) -> int:
        """Grid steps of a core: the most visits of a block in the outermost loop.

        0 where there is no loop.
        """
        loops = {b.depth for b in self.run.blocks if b.depth and b.visits}
        if not loops:
            return 0
        outer = [b for b in self.run.blocks if b.depth == min(loops)]
        return max(b.visits for b in outer)

    @property
    def transfer_cycles(self) -> float:
        """Cycles that this core's HBM traffic takes alone."""
        bytes_ = self.run.read_bytes + self.run.written_bytes
        return bytes_ / self.chip.core_bytes_per_cycle

    @property
    def binds(self) -> str:
        """What takes longest alone: `compute`, `hbm`, or `waits` for its latency."""
        busy = self.run.cycles - self.run.wait
        if self.run.wait > max(busy, self.transfer_cycles):
            return "waits"
        return "compute" if busy >= self.transfer_cycles else "hbm"


def simulate(
    schedule: Schedule,
    chip: Chip,
    scalars: Mapping[int, Sequence[int]] | None = None,
) -> tuple[Run, ...]:
    """The schedule on each core of a device.

    Raises:
        ScheduleError: see `Simulator.simulate`.
    """
    memory = Memory(
        bytes_per_cycle=chip.core_bytes_per_cycle,
        latency=HBM_LATENCY_S * chip.hertz,
    )
    core = Core(
        memory=memory,
        row_cycles=chip.row_cycles,
        delay_slots=chip.delay_slots,
        jump_cycles=chip.jump_s * chip.hertz,
        far=FAR,
    )
    return tuple(
        Simulator(schedule, core, number=number, scalars=scalars).simulate()
        for number in range(chip.cores)
    )


def read(dump: Dump, name: str) -> Schedule:
    """An operation's schedule with the cycles of each bundle.

    Raises:
        ScheduleError: texts that cannot be read.
    """
    schedule = parse(dump.bundles, name)
    if dump.cycles_utilization and dump.bundles_utilization:
        empty = [not (b.scalar or b.slots) for b in schedule.bundles]
        cycles = cycles_of_bundles(
            dump.cycles_utilization, dump.bundles_utilization, empty
        )
        for bundle, n in zip(schedule.bundles, cycles, strict=True):
            bundle.cycles = n
    return schedule


def calls(program: str, trips: Mapping[str, int] | None = None) -> Counter[str]:
    """How often the top-level program, in text, calls each operation.

    `trips` says how often one inside a loop runs: see `bench.tpu.trips`.

    Raises:
        ScheduleError: a call inside a loop of a length that is not known.
    """
    found: Counter[str] = Counter()
    for line in program.splitlines():
        name = re.search(r"inlined_call\b[^;]*?/\* %([\w.-]+) = ", line)
        if name:
            looped = re.match(r"\s*\S+\s+\w*:\s*>", line)
            if looped and name[1] not in (trips or {}):
                raise ScheduleError(f"{name[1]} is called in a loop of the program")
            found[name[1]] += trips[name[1]] if looped and trips else 1
    return found


def operations(
    schedules: Mapping[str, Dump],
    chip: Chip,
    scalars: Mapping[int, Sequence[int]] | None = None,
    trips: Mapping[str, int] | None = None,
) -> tuple[list[Operation], dict[str, str]]:
    """Every operation of a program, and those that cannot be timed, with the reason.

    `trips`: see `calls`.

    Raises:
        ScheduleError: a Pallas kernel, or a product of XLA's, that cannot be followed;
            no Pallas kernel at all.
    """
    top = schedules.get("TLP")
    count = calls(top.bundles if top else "", trips)
    done: list[Operation] = []
    skipped: dict[str, str] = {}
    for dump in schedules.values():
        entry = re.search(r"entry bundle: %([\w.-]+) = (.*)", dump.bundles)
        if not entry:
            continue  # the program itself, and what surrounds it
        name = entry[1]
        if not count[name]:
            raise ScheduleError(f"the program's text calls no {name}")
        pallas = "custom-call" in entry[0]
        try:
            runs = simulate(read(dump, name), chip, scalars if pallas else None)
        except ScheduleError as error:
            if pallas or "vmatmul" in dump.bundles:
                # Too much of the time to leave out.
                raise
            skipped[name] = str(error)
            continue
        done.append(
            Operation(
                name=name,
                pallas=pallas,
                calls=count[name],
                chip=chip,
                runs=runs,
            )
        )
    if not any(one.pallas for one in done):
        raise ScheduleError("no Pallas kernel among the schedules")
    return done, skipped


def hot_blocks(run: Run, share: float = 0.01) -> list[Block]:
    """Blocks that take at least `share` of the cycles, in program order."""
    return [b for b in run.blocks if b.cycles >= share * run.cycles]
