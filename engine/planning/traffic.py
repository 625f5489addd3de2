"""What a compiled program moves: to and from memory, and between devices."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.planning.hlo import Computation, Executed, Instruction, Program, size_of
from engine.planning.overlap import CHAIN, Overlap

_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
# What moves nothing itself.
_FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast while conditional call "
    "after-all add-dependency opt-barrier partition-id replica-id iota "
    "domain copy-done async-start async-update async-done "
    "call-start call-update call-done".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_NAMED_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\] *(?:\(.*?\) *)?\{([^}]*)\}"
)
_IOTA_GROUPS = re.compile(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
)
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")


class Collective(NamedTuple):
    """One kind of exchange along some axes of the mesh, all of its calls together."""

    kind: str
    axes: tuple[str, ...]
    group: int  # devices that take part in one
    calls: int  # of a step, loops counted as often as they run
    payload: int  # bytes: of what is gathered, or summed, on each device
    wire: int  # bytes that each device receives, in rings
    exposed: int  # of these, what no product, kernel or loop runs beside


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Of one run of a program, on each device."""

    collectives: tuple[Collective, ...]
    memory_bytes: int  # read and written
    unknown_loops: int  # whose trips are not known, and which are counted once


def traffic_of(program: Program, mesh: Mapping[str, int]) -> Traffic:
    """What a program moves; `mesh`: the sizes of its axes, in their order."""
    found: dict[tuple[str, tuple[str, ...], int], list[int]] = {}
    seen: set[tuple[str, str]] = set()
    memory = 0
    overlap = Overlap(program)
    for ran in program.executed():
        if not ran.fused:
            memory += ran.trips * moved(program, ran.within, ran.instruction)
        exchange = _exchange(ran, mesh, seen)
        if exchange is None:
            continue
        key, payload, wire = exchange
        exposed = 0 if overlap.covers(ran) else wire
        sums = found.setdefault(key, [0, 0, 0, 0])
        for i, value in enumerate((1, payload, wire, exposed)):
            sums[i] += ran.trips * value
    return Traffic(
        collectives=tuple(
            Collective(*key, *sums)
            for key, sums in sorted(found.items(), key=lambda x: -x[1][2])
        ),
        memory_bytes=memory,
        unknown_loops=len(program.unknown_loops),
    )


def _exchange(
    ran: Executed, mesh: Mapping[str, int], seen: set[tuple[str, str]]
) -> tuple[tuple[str, tuple[str, ...], int], int, int] | None:
    """((kind, axes, group), payload, wire bytes) of a collective among several."""
    one = ran.instruction
    kind = one.opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return None
    axes = axes_of(one.attributes, mesh)
    group = math.prod(mesh[axis] for axis in axes)
    if group == 1:
        return None
    # libtpu writes one exchange into several fusions, each of which does a part of it.
    chain, channel = (x.search(one.attributes) for x in (CHAIN, _CHANNEL))
    if chain and channel and ran.fused:
        key = channel[1], chain[1]
        if key in seen:
            return None
        seen.add(key)
    given = (ran.within.instructions.get(name) for name in one.operands)
    payload = sum(size_of(x.shape) for x in given if x is not None)
    if kind == "all-gather":
        payload *= group
    share = (group - 1) / group
    wire = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
    return (kind, axes, group), payload, math.ceil(wire * payload)


def axes_of(attributes: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh along which the devices of one group differ."""
    if named := _NAMED_GROUPS.search(attributes):
        return tuple(x for x in re.findall(r"'([^']+)'", named[2]) if mesh[x] > 1)
    if iota := _IOTA_GROUPS.search(attributes):
        dims, sizes = (tuple(map(int, iota[i].split(","))) for i in (1, 2))
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        if iota[3]:
            ids = ids.transpose(tuple(map(int, iota[3].split(","))))
        first = ids.reshape(dims)[0].tolist()
    elif listed := _LISTED_GROUPS.search(attributes) or _PAIRS.search(attributes):
        first = [int(x) for x in ",".join(listed.groups()).split(",")]
    else:  # all devices
        first = list(range(math.prod(mesh.values())))
    places = np.unravel_index(np.asarray(first), tuple(mesh.values()))
    return tuple(
        axis
        for axis, along in zip(mesh, places, strict=True)
        if len(set(along.tolist())) > 1
    )


def moved(program: Program, within: Computation, one: Instruction) -> int:
    """Bytes that an instruction reads of memory and writes to it.

    Of an array of which a fusion, or a slice, takes a part, the part; of one that is
    changed in place, what is changed.
    """
    if one.opcode in _FREE or one.opcode.endswith("-done"):
        return 0
    written = size_of(one.shape, slow=True)
    given = [within.instructions.get(name) for name in one.operands]
    shapes = [x.shape for x in given if x is not None]
    if one.opcode in _SLICES:
        return 2 * written
    if one.opcode == "dynamic-update-slice":
        return 2 * size_of(shapes[1], slow=True)
    if one.opcode in ("copy-start", "slice-start"):
        return _moved_by_start(one, shapes[0])
    if one.opcode in ("fusion", "fusion-start"):
        called = re.search(r"calls=%([\w.\-]+)", one.attributes)
        assert called, one
        inside = program.computations[called[1]]
        if one.opcode == "fusion-start":  # whose shape has what it is given, too
            written = size_of(inside.instructions[inside.root].shape)
        return _moved_by_fusion(program, inside, shapes, written)
    return written + sum(size_of(shape, slow=True) for shape in shapes)


def _moved_by_start(one: Instruction, source: str) -> int:
    """Of a copy of an array, or a part of it, that goes on beside other work.

    Its own shape is (target, source, ...) of a copy, ((source), target, ...) of a part.
    """
    arrays = re.findall(r"[a-z]\w*\[[0-9,]*\](?:\{[^}]*\})?", one.shape)
    target = arrays[0] if one.opcode == "copy-start" else arrays[1]
    read = size_of(target) if size_of(source, slow=True) else 0
    return read + size_of(target, slow=True)


def _moved_by_fusion(
    program: Program, inside: Computation, shapes: list[str], written: int
) -> int:
    root = inside.instructions[inside.root]
    roots = [root]
    if root.opcode == "tuple":
        parts = (inside.instructions.get(x) for x in root.operands)
        roots = [x for x in parts if x is not None]
    unread: set[str] = set()
    for part in (_source(inside, x) for x in roots):
        if part.opcode == "parameter":  # handed on
            written -= size_of(part.shape, slow=True)
            unread.add(part.name)
        elif part.opcode == "dynamic-update-slice":
            update, array = inside.operand(part, 1), inside.operand(part, 0)
            assert update and array, part
            written -= size_of(part.shape, slow=True) - size_of(update.shape, slow=True)
            unread.add(_source(inside, array).name)
    # A part of an exchange, whose bytes are counted as such.
    exchanged = {
        form
        for x in inside.instructions.values()
        if x.opcode in _COLLECTIVES
        for form in _forms(x.shape)
    }
    written -= sum(
        size_of(x.shape, slow=True)
        for x in roots
        if x.opcode != "parameter" and _forms(x.shape) <= exchanged
    )
    read = 0
    for parameter, shape in zip(inside.parameters, shapes, strict=True):
        if parameter.name in unread or _forms(shape) <= exchanged:
            continue
        whole = size_of(shape, slow=True)
        uses = _uses(program, inside, parameter)
        if whole and uses and all(x.opcode in _SLICES for x in uses):
            whole = min(whole, sum(size_of(x.shape) for x in uses))
        read += whole
    return max(written, 0) + read


def _forms(shape: str) -> set[str]:
    """Types and sizes of a shape's arrays, without layouts."""
    return set(re.findall(r"[a-z]\w*\[[0-9,]*\]", shape))


def _source(inside: Computation, one: Instruction) -> Instruction:
    """What a chain of bitcasts begins with."""
    while one.opcode in ("bitcast", "convert") and one.operands:
        before = inside.operand(one, 0)
        if before is None:
            break
        one = before
    return one


def _uses(program: Program, inside: Computation, one: Instruction) -> list[Instruction]:
    """Who takes an array; casts, bitcasts and fusions are looked through."""
    found = []
    for user in inside.users[one.name]:
        if user.opcode in ("bitcast", "convert"):
            found += _uses(program, inside, user)
        elif user.opcode == "fusion":
            called = re.search(r"calls=%([\w.\-]+)", user.attributes)
            assert called, user
            nested = program.computations[called[1]]
            for name, parameter in zip(user.operands, nested.parameters, strict=True):
                if name == one.name:
                    found += _uses(program, nested, parameter)
        else:
            found.append(user)
    return found
