"""What a compiled program says of itself: its instructions, and how often each runs.

XLA's own `cost_analysis()` counts what is inside a loop once. Here a loop counts as
often as it runs: XLA writes that beside most loops, and of the others whose condition
compares a counter with a constant it follows from that. Attention goes over as many
tiles of keys as its data has it, of n at most; causality leaves (n + 1) / 2 of them in
the mean, and that is taken. What is left is counted once, and told
(`Program.unknown_loops`).
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from engine.models.attention.tiles import SCOPE

_BYTES = {"pred": 1, "token": 0, "bf16": 2, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"([a-z]+[0-9]*(?:e[0-9]\w*)?)\[([0-9,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"\b(calls|to_apply|body|condition)=%([\w.\-]+)")
_BRANCHES = re.compile(
    r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%([\w.\-]+)"
)
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ATTENTION = f"/{SCOPE}"  # in the names of its instructions
_FAST_MEMORY = "S(1)"  # in a TPU's layouts: on the chip


class Instruction(NamedTuple):
    """One line of a program."""

    name: str
    opcode: str
    shape: str  # as XLA writes it: `bf16[4,8]{1,0}`, or a tuple of such
    operands: tuple[str, ...]  # names
    attributes: str  # all that follows


class Executed(NamedTuple):
    """An instruction, and how often a run of the program comes to it."""

    instruction: Instruction
    within: "Computation"
    trips: int
    fused: bool  # it is part of a fusion, which is counted as one


@dataclass(frozen=True)
class Computation:
    """A function of a program."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    def operand(self, instruction: Instruction, index: int) -> Instruction | None:
        """The instruction that an operand is the result of."""
        names = instruction.operands
        return self.instructions.get(names[index]) if index < len(names) else None

    @cached_property
    def parameters(self) -> list[Instruction]:
        """In their order."""
        found = [x for x in self.instructions.values() if x.opcode == "parameter"]
        return sorted(found, key=lambda x: int(x.operands[0]))

    @cached_property
    def places(self) -> dict[str, int]:
        """Of each instruction, how many are written down before it."""
        return {name: i for i, name in enumerate(self.instructions)}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Of each instruction, those that take its result."""
        found: dict[str, list[Instruction]] = {x: [] for x in self.instructions}
        for one in self.instructions.values():
            for name in one.operands:
                if name in found:
                    found[name].append(one)
        return found


@dataclass
class Program:
    """A compiled module, from its text (`compiled.as_text()`)."""

    computations: Mapping[str, Computation]
    entry: str
    unknown_loops: set[str] = field(default_factory=set)
    sequence: int = 1  # devices that the queries of a row are spread over

    def executed(self) -> Iterator[Executed]:
        """Every instruction that runs, in order."""
        yield from self._run(self.computations[self.entry], 1, 1, False)

    def _run(
        self, computation: Computation, trips: int, around: int, fused: bool
    ) -> Iterator[Executed]:
        """`around`: how often the innermost loop runs that it is in."""
        for one in computation.instructions.values():
            yield Executed(one, computation, trips, fused)
            called = dict(CALLED.findall(one.attributes))
            if one.opcode == "while":
                count = self.trips(one, computation)
                total = trips * (count or 1)
                if count is None and _ATTENTION in one.attributes:
                    total = trips * (around * self.sequence + 1) // 2
                elif count is None:
                    self.unknown_loops.add(one.name)
                for name in (called["condition"], called["body"]):
                    inside = self.computations[name]
                    yield from self._run(inside, total, count or 1, fused)
            elif one.opcode == "conditional":
                every = self._of(one)
                branches = [list(self._run(x, trips, around, fused)) for x in every]
                yield from max(branches, key=_results)
            elif one.opcode in ("call", "fusion", "async-start", "call-start"):
                name = called.get("calls") or called["to_apply"]
                inside = fused or one.opcode == "fusion"
                yield from self._run(self.computations[name], trips, around, inside)

    def _of(self, conditional: Instruction) -> list[Computation]:
        found = []
        for several, one in _BRANCHES.findall(conditional.attributes):
            names = _NAME.findall(several) if several else [one]
            found += [self.computations[name] for name in names]
        return found

    def trips(self, loop: Instruction, within: Computation) -> int | None:
        """How often a loop runs; None where that is not to be seen."""
        if found := _TRIPS.search(loop.attributes):
            return int(found[1])
        condition = self.computations[
            dict(CALLED.findall(loop.attributes))["condition"]
        ]
        root = condition.instructions[condition.root]
        counter, bound = (condition.operand(root, i) for i in (0, 1))
        if (
            root.opcode == "compare"
            and "direction=LT" in root.attributes
            and counter is not None
            and counter.opcode == "get-tuple-element"
            and (last := _constant(bound)) is not None
        ):
            index = re.search(r"index=(\d+)", counter.attributes)
            start = within.operand(loop, 0)
            first = None
            if index and start is not None and start.opcode == "tuple":
                first = _constant(within.operand(start, int(index[1])))
            return last - (first or 0)
        return None


def _results(ran: list[Executed]) -> int:
    """Bytes of all results: by which one branch is larger than another."""
    return sum(x.trips * size_of(x.instruction.shape) for x in ran)


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    text = instruction.operands[0]
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def size_of(shape: str, *, slow: bool = False) -> int:
    """Bytes of a shape; with `slow`, of what is not in a TPU's memory on the chip."""
    total = 0.0
    for kind, sizes, layout in _ARRAY.findall(shape):
        if slow and _FAST_MEMORY in layout:
            continue
        width = _BYTES.get(kind)
        if width is None:
            bits = re.match(r"[a-z]+(\d+)", kind)
            width = int(bits[1]) / 8 if bits else 0
        total += width * math.prod(int(x) for x in sizes.split(",") if x)
    return math.ceil(total)


def parse(text: str, sequence: int = 1) -> Program:
    """The program that XLA has written down; `sequence`: see `Program`."""
    computations, entry = {}, ""
    found: dict[str, Instruction] = {}
    name = root = ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
            named = _NAME.search(line)
            assert named, line[:200]
            name, root, found = named[1], "", {}
            if line.startswith("ENTRY "):
                entry = name
        elif line.startswith("}"):  # of a SparseCore, with its name
            computations[name] = Computation(name, found, root)
        elif line.startswith("  ") and " = " in line:
            one = _instruction(line.strip().removeprefix("ROOT "))
            found[one.name] = one
            if line.lstrip().startswith("ROOT "):
                root = one.name
    assert entry, "no entry in what should be a compiled program"
    return Program(computations, entry, sequence=sequence)


def _instruction(line: str) -> Instruction:
    name, _, rest = line.partition(" = ")
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    opcode, rest = rest[:opening], rest[opening:]
    end = _closing(rest)
    inside = rest[1:end]
    operands = tuple(_NAME.findall(inside))
    if opcode in ("parameter", "constant"):
        operands = (inside,)
    return Instruction(name.lstrip("%"), opcode, shape, operands, rest[end + 1 :])


def _closing(text: str) -> int:
    """Where the parenthesis ends that `text` begins with."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise AssertionError(f"an unclosed parenthesis: {text[:200]}")
