"""Which collectives of a compiled program may run beside a loop that has some, too."""

import re

COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(-start)?\("
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")


def _computations(hlo: str) -> dict[str, list[tuple[str, str]]]:
    """The instructions of each computation, as (name, the rest of its line)."""
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in hlo.splitlines():
        if instruction := _INSTRUCTION.match(line):
            current.append((instruction[1], instruction[2].split(", metadata=")[0]))
        elif header := _COMPUTATION.match(line):
            current = found.setdefault(header[1], [])
    return found


def unordered(hlo: str) -> list[str]:
    """Pairs "loop, later collective" of which the second does not need the first.

    hlo: the text of a scheduled module.
    """
    assert "is_scheduled=true" in hlo
    computations = _computations(hlo)

    def has_collectives(rest: str) -> bool:
        if COLLECTIVE.search(rest):
            return True
        called = [name for name in _NAME.findall(rest) if name in computations]
        return any(
            has_collectives(inner) for name in called for _, inner in computations[name]
        )

    found = []
    for instructions in computations.values():
        # Of each instruction, the loops with collectives that it needs the results of.
        needs: dict[str, set[str]] = {}
        loops: list[str] = []
        for name, rest in instructions:
            mine = set[str]().union(*(needs.get(x, ()) for x in _NAME.findall(rest)))
            needs[name] = mine
            if not has_collectives(rest):
                continue
            found += [f"{loop}, {name}" for loop in loops if loop not in mine]
            if not COLLECTIVE.search(rest):
                loops.append(name)
                mine.add(name)
    return found
