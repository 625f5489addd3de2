"""A schedule cut into blocks that run in a row, and what a run of them counts."""

from collections import Counter
from dataclasses import dataclass, field

from bench.tpu import decode
from bench.tpu.bundles import Schedule
from bench.tpu.transfers import Memory


@dataclass(frozen=True, kw_only=True)
class Core:
    """One core: its memory, its matrix units, its branches."""

    memory: Memory
    row_cycles: float  # that a row of a matmul takes at least
    delay_slots: int  # cycles after a branch that run whichever way it goes
    jump_cycles: float = 0.0  # lost at a jump back over `far` bundles or more
    far: int = 1


@dataclass
class Block:
    """Bundles [start, stop) that run in a row, and how often they did."""

    start: int
    stop: int
    depth: int  # loops around
    slots: Counter[str]
    matmul_rows: int
    spills: int
    # Cycles beyond one a bundle: delays in the schedule, and what the matrix units need
    # more than that.
    stall: float
    floor: float  # what is in `stall` for the matrix units alone
    visits: int = 0
    wait: float = 0.0

    @property
    def bundles(self) -> int:
        """Of one visit."""
        return self.stop - self.start

    @property
    def cycles(self) -> float:
        """Of all visits."""
        return self.visits * (self.bundles + self.stall) + self.wait


@dataclass
class Run:
    """What happened, in cycles and bytes."""

    cycles: float = 0.0
    wait: float = 0.0  # for transfers
    jumps: float = 0.0  # lost at jumps
    read_bytes: int = 0
    written_bytes: int = 0
    transfers: int = 0
    blocks: list[Block] = field(default_factory=list)


def blocks(schedule: Schedule, core: Core) -> list[Block]:
    """The schedule cut where control flow joins or leaves."""
    bundles = schedule.bundles
    cuts = {0, len(bundles)} | {i for i, b in enumerate(bundles) if b.label}
    for i, bundle in enumerate(bundles):
        for one in bundle.scalar:
            if one.opcode.startswith("sbr"):
                cuts |= {after(schedule, core, i), decode.target(one, schedule)}
    order, found = sorted(cuts), []
    for start, stop in zip(order, order[1:], strict=False):
        inside = bundles[start:stop]
        rows = sum(b.matmul_rows for b in inside)
        cycles = sum(b.cycles for b in inside)
        floor = max(0.0, rows * core.row_cycles - cycles)
        found.append(
            Block(
                start,
                stop,
                inside[0].depth,
                slots=sum((b.slots for b in inside), Counter()),
                matmul_rows=rows,
                spills=sum(b.spills for b in inside),
                stall=cycles - len(inside) + floor,
                floor=floor,
            )
        )
    return found


def after(schedule: Schedule, core: Core, branch: int) -> int:
    """The first bundle that a branch skips."""
    left, i = core.delay_slots, branch + 1
    while left > 0 and i < len(schedule.bundles):
        left -= schedule.bundles[i].cycles
        i += 1
    return i
