"""How often the operations inside XLA's while loops run, from the compiled HLO.

Only loops as `lax.fori_loop` and `lax.scan` make them: a counter from a constant to a
constant, in constant steps.
"""

import re
from dataclasses import dataclass, field

_HEAD = re.compile(r"(?:ENTRY )?%([\w.-]+) \(.*\) -> .*\{$")
_UNKNOWN = 2**62
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_LINE = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.*)")


@dataclass
class _Computation:
    lines: dict[str, str] = field(default_factory=dict)  # operation -> what it is
    root: str = ""

    def operands(self, name: str, opcode: str) -> list[str]:
        """Of an operation, if it is of that kind."""
        found = re.search(rf" {opcode}\(([^)]*)\)", self.lines.get(name, ""))
        return re.findall(r"%([\w.-]+)", found[1]) if found else []

    def constant(self, name: str) -> int | None:
        """The integer that a name stands for, through copies."""
        while found := self.operands(name, "copy"):
            name = found[0]
        value = re.search(r" constant\((-?\d+)\)", self.lines.get(name, ""))
        return int(value[1]) if value else None


def _computations(text: str) -> dict[str, _Computation]:
    found: dict[str, _Computation] = {}
    inside = _Computation()
    for line in text.splitlines():
        if head := _HEAD.match(line):
            inside = found.setdefault(head[1], _Computation())
        elif match := _LINE.match(line):
            inside.lines[match[1]] = match[2]
            if line.lstrip().startswith("ROOT"):
                inside.root = match[1]
    return found


def _turns(
    outside: _Computation, loop: str, test: _Computation, body: _Computation
) -> int | None:
    """Of one loop; None where its counter is not all constants."""
    if "direction=LT" not in test.lines.get(test.root, ""):
        return None
    compared = test.operands(test.root, "compare")
    if len(compared) != 2:
        return None
    index = re.search(r"index=(\d+)", test.lines.get(compared[0], ""))
    stop = test.constant(compared[1])
    (given,) = outside.operands(loop, "while") or ("",)
    starts = outside.operands(given, "tuple")
    steps = body.operands(body.root, "tuple")
    if index is None or stop is None or int(index[1]) >= min(len(starts), len(steps)):
        return None
    start = outside.constant(starts[int(index[1])])
    added = body.operands(steps[int(index[1])], "add")
    step = body.constant(added[1]) if len(added) == 2 else None
    if start is None or not step or step < 0:
        return None
    return max(0, -(-(stop - start) // step))


def estimated_cycles(text: str) -> dict[str, int]:
    """Operation -> the cycles that XLA expects one run of it to take, where it says.

    Of some it says that it does not know, by the largest number that there is.
    """
    lines = (_LINE.match(line) for line in text.splitlines())
    found = ((x[1], _CYCLES.search(x[2])) for x in lines if x)
    known = {name: int(cycles[1]) for name, cycles in found if cycles}
    return {name: cycles for name, cycles in known.items() if cycles < _UNKNOWN}


def trips(text: str, unknown: int | None = None) -> dict[str, int]:
    """Operation inside a loop -> its runs in one call of the program.

    Those in a loop whose length is not known run `unknown` times; None: they are left
    out.
    """
    computations = _computations(text)
    around: dict[str, tuple[str, int | None]] = {}  # body -> where its loop is, turns
    for place, outside in computations.items():
        for name, line in outside.lines.items():
            if " while(" not in line:
                continue
            found = re.search(r"condition=%([\w.-]+), body=%([\w.-]+)", line)
            if found and found[1] in computations and found[2] in computations:
                test, body = computations[found[1]], computations[found[2]]
                around[found[2]] = place, _turns(outside, name, test, body)

    def runs(place: str) -> int | None:
        if place not in around:
            return 1
        outer, turns = around[place]
        every = runs(outer)
        return unknown if turns is None or every is None else turns * every

    known = {}
    for place in around:
        count = runs(place)
        if count is not None:
            known |= dict.fromkeys(computations[place].lines, count)
    return known
