"""What branches, stores, loads, transfers and waits mean."""

import re
from collections import defaultdict
from dataclasses import dataclass

from bench.tpu.bundles import Instruction, Schedule, ScheduleError
from bench.tpu.scalar import Read, Registers, Value, clean, operand, predicate, split

_EFFECTS = ("sbr", "dma", "vsyncadd", "vsyncpa", "sst")


def has_effect(one: Instruction) -> bool:
    """Whether it does more than compute a value."""
    return one.opcode.startswith(_EFFECTS)


def live(schedule: Schedule) -> set[str]:
    """Names of values that reach a branch, a transfer, a wait or memory."""
    inputs: dict[str, set[str]] = defaultdict(set)
    found: set[str] = set()
    for bundle in schedule.bundles:
        for one in bundle.scalar:
            needs = set(re.findall(r"%([sp]\d+)_[sp]\d+", one.rest))
            if has_effect(one):
                found |= needs
            if one.dest:
                inputs[one.dest.partition("_")[0]] |= needs
    todo = list(found)
    while todo:
        for name in inputs[todo.pop()] - found:
            found.add(name)
            todo.append(name)
    return found


def check_phi(phi: Instruction, register: str) -> None:
    """A phi does nothing as long as its values share its register.

    Raises:
        ScheduleError: they do not.
    """
    if set(re.findall(r"%[sp]\d+_([sp]\d+)", phi.rest)) != {register}:
        raise ScheduleError(f"a phi over several registers: {phi.rest}")


def place(one: Instruction) -> tuple[Read, str]:
    """The address in `[smem:[a + b]]`, and what follows it.

    Raises:
        ScheduleError: another form.
    """
    found = re.match(r"\[smem:\[?(.*?)\]?\](.*)$", clean(one.rest), re.DOTALL)
    if not found:
        raise ScheduleError(f"cannot read the address of {one.rest!r}")
    parts = [x for x in found[1].strip(" []").split(" + ") if x]
    reads = [operand(f"[{x}]" if x[0] == "#" else x) for x in parts]

    def address(registers: Registers) -> Value:
        values = [read(registers) for read in reads]
        known = [x for x in values if x is not None]
        return sum(known) if len(known) == len(values) else None

    return address, found[2].strip().removeprefix("]").strip(" ,")


def is_core_id(load: Instruction) -> bool:
    """Whether a load is of this core's number."""
    return bool(re.search(r"/\*[^*]*\bcore id\b[^*]*\*/", load.rest))


def target(branch: Instruction, schedule: Schedule) -> int:
    """The bundle that a branch goes to.

    Raises:
        ScheduleError: there is none.
    """
    region = re.search(r"target = \$region(\d+)", branch.rest)
    if region and int(region[1]) in schedule.regions:
        return schedule.regions[int(region[1])]
    last = schedule.bundles[-1]
    if region and last.label == "PF" and not last.starts:
        return len(schedule.bundles) - 1  # what follows a region that ends the kernel
    raise ScheduleError(f"no target of {branch.rest!r}")


def flag(one: Instruction) -> tuple[Read | None, Read, Read]:
    """Predicate, flag and amount of a wait or of a count of a flag."""
    when, rest = predicate(clean(one.rest))
    name, amount = (operand(x) for x in split(rest))
    return when, name, amount


@dataclass(frozen=True)
class Transfer:
    """A `dma.*` instruction; source and target are memories' names."""

    when: Read | None
    size: Read
    flag: Read
    source: str
    target: str
    source_address: Read
    target_address: Read


def transfer(one: Instruction) -> Transfer:
    """A transfer's operands.

    Raises:
        ScheduleError: an operand is missing.
    """
    named = dict(
        re.findall(r"/\*(\w+)=\*/\s*(\[#[^\]]*\]|[^,\s]+)", one.rest),
    )
    if not {"size_in_granules", "dst_syncflagno"} <= named.keys():
        raise ScheduleError(f"{one.opcode} without a size or a flag")
    when, _ = predicate(re.sub(r"^\[thread:\$\d+\]\s*", "", clean(one.rest)))
    way = re.search(r"/\* ([\w-]+-to-[\w-]+) \*/", one.rest)
    kind = way[1] if way else one.opcode.partition(".")[2].replace("_", "-")
    source, _, to = kind.partition("-to-")

    def address(memory: str) -> Read:
        return operand(named[memory]) if memory in named else lambda _: None

    return Transfer(
        when,
        operand(named["size_in_granules"]),
        operand(named["dst_syncflagno"]),
        source,
        to,
        address(source),
        address(to),
    )


def argument(one: Instruction) -> tuple[int, bool]:
    """Number of a kernel's operand, and whether the register holds its value.

    Raises:
        ScheduleError: it has no number.
    """
    index = re.search(r"index: (\d+)", one.rest)
    if not index:
        raise ScheduleError(f"which operand is {one.rest!r}?")
    return int(index[1]), "no memory space" in one.rest.partition("[")[0]
