"""Reads the TPU compiler's final schedule: one VLIW bundle a line, one bundle a cycle.

The text is what `--xla_jf_dump_llo_text` leaves in `*-final_bundles.txt`:

    0x2d LB: > { %p1_p0 = scmp.eq.s32.totalorder %s2_s14, 0  ;;  %3 = sbr.rel ... }

Before the colon stands the address and perhaps a label: LB a loop's body, PF what
follows a predicated region; `>` counts the loops around. A comment after the bundle
tells which regions start and end there. A branch takes effect a few bundles later.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

_BUNDLE = re.compile(
    r"\s*(?:0x)?([0-9a-f]+)\s+([A-Z]{2})?:\s*(>*)\s*\{(.*)$", re.DOTALL
)
_TAIL = re.compile(r"\}\s*((?:/\*(?:(?!\*/).)*\*/\s*)*)$", re.DOTALL)
_STARTS = re.compile(r"Start(?:/End empty)? region (\d+)")
_INSTRUCTION = re.compile(r"(?:%([a-z0-9_]+) = )?([a-z][\w.-]*)\s*(.*)$", re.DOTALL)

# Slots that a person who tunes a kernel asks about; the first pattern that fits counts.
_SLOTS = (
    ("vmatmul", re.compile(r"vmatmul|vdwg|vmatmac")),
    ("vmatpush", re.compile(r"vmatpush|vmatprep\.subr|vlgmr|vlmr")),
    ("vmatprep", re.compile(r"vmatprep")),
    ("mxu_pop", re.compile(r"vpop\.f32\.mrf|vpop\.[fs]32\.mr[fb]|vpop.*\.mr[fb]")),
    ("eup_pop", re.compile(r"vpop\.eup")),
    ("xlu", re.compile(r".*\.xlu\d|vpop\.(xlane|permute|trf)|vrot|vxpose")),
    ("vld", re.compile(r"vld")),
    ("vst", re.compile(r"vst(?!v)")),
    ("eup", re.compile(r"vpow2|vlog2|vrcp|vrsqrt|vtanh|verf|vsin|vcos|vsigm")),
    ("vdelay", re.compile(r"vdelay|vnop")),
    ("dma", re.compile(r"dma|vsync")),
    ("valu", re.compile(r"v")),
)


class ScheduleError(Exception):
    """A schedule that this module cannot read or follow; one line says where."""


@dataclass(frozen=True)
class Instruction:
    """`%dest = opcode rest`; `dest` is "" where nothing is written."""

    dest: str
    opcode: str
    rest: str


@dataclass
class Bundle:
    """One cycle's instructions."""

    address: int
    label: str  # LB, PF, ... or ""
    depth: int  # loops around it
    scalar: list[Instruction] = field(default_factory=list)
    slots: Counter[str] = field(default_factory=Counter)
    starts: tuple[int, ...] = ()  # regions that start here
    matmul_rows: int = 0  # of the left operand, over all `vmatmul`s
    spills: int = 0
    cycles: int = 1


@dataclass
class Schedule:
    """A kernel's bundles, in order, and where each region starts."""

    name: str
    bundles: list[Bundle]
    regions: dict[int, int]  # region -> index into bundles


def slot(opcode: str) -> str:
    """The slot that an opcode takes; "" for scalar work."""
    return next((name for name, like in _SLOTS if like.match(opcode)), "")


def _rows(opcode: str) -> int:
    """Rows that one `vmatmul` feeds: 1024 lanes of 4 bytes hold 8 float32 rows."""
    for kind, rows in (("bf16", 16), ("f32", 8), ("f8", 32), ("s8", 32), ("u8", 32)):
        if f".{kind}" in opcode:
            return rows
    raise ScheduleError(f"unknown element type of {opcode}")


def _lines(text: str) -> list[str]:
    """One string a bundle; comments may run over the end of a line."""
    joined: list[str] = []
    for line in text.splitlines():
        if _BUNDLE.match(line):
            joined.append(line)
        elif joined and line.strip():
            joined[-1] += " " + line
    return joined


def _bundle(line: str) -> Bundle:
    match = _BUNDLE.match(line)
    assert match is not None
    address, label, depth, body = match.groups()
    bundle = Bundle(int(address, 16), label or "", len(depth))
    tail = _TAIL.search(body)
    if not tail:
        raise ScheduleError(f"bundle {bundle.address:#x} does not end: {line!r}")
    bundle.starts = tuple(int(n) for n in _STARTS.findall(tail[1]))
    body = body[: tail.start()].strip()
    for part in re.split(r"\s+;;\s+", body) if body else ():
        found = _INSTRUCTION.match(part.strip())
        if not found:
            raise ScheduleError(f"bundle {bundle.address:#x}: cannot read {part!r}")
        instruction = Instruction(found[1] or "", found[2], found[3])
        kind = slot(instruction.opcode)
        if kind:
            bundle.slots[kind] += 1
            if kind == "vmatmul":
                bundle.matmul_rows += _rows(instruction.opcode)
            bundle.spills += "_spill]" in part and kind in ("vld", "vst")
        if not kind or kind == "dma" or re.match(r"[sp]\d", instruction.dest):
            bundle.scalar.append(instruction)
    return bundle


def parse(text: str, name: str = "") -> Schedule:
    """The schedule of one kernel.

    Raises:
        ScheduleError: no bundles, or addresses that leave one out.
    """
    bundles = [_bundle(line) for line in _lines(text)]
    if not bundles:
        raise ScheduleError(f"{name or 'text'}: no bundles; is it final_bundles.txt?")
    for i, bundle in enumerate(bundles):
        if bundle.address != i:
            raise ScheduleError(
                f"{name}: bundle {i:#x} is missing, {bundle.address:#x} stands there"
            )
    regions = {n: i for i, b in reversed(list(enumerate(bundles))) for n in b.starts}
    return Schedule(name, bundles, regions)
