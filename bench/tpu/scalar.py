"""The scalar unit's instructions as Python functions.

A value is an int, or None where it is not known: what a kernel reads from memory that
nobody described. An unknown value may be computed with; it may not decide a branch, a
transfer's size or a wait, which the simulator checks. Addresses live far above 32 bits,
one range per allocation, so that arithmetic on them needs no types.
"""

import re
from collections.abc import Callable

from bench.tpu.bundles import Instruction, ScheduleError

Value = int | None
Registers = dict[str, Value]
Read = Callable[[Registers], Value]

_ADDRESS = 1 << 44  # allocations start at its multiples
_REGISTER = re.compile(r"(!?)%[sp]\d+_([sp]\d+)$")
_ALLOCATION = re.compile(r"\[?#allocation(\d+)(?:_spill)?(?: \+ (\$?\w+))?\]?$")


def allocation(number: int) -> int:
    """The address of `#allocationN`."""
    return (number + 1) * _ADDRESS


def integer(text: str) -> int:
    """A literal: decimal, or `$0x1f`."""
    return int(text.removeprefix("$"), 0)


def operand(text: str) -> Read:
    """How to read `%s1_s2`, `!%p1_p2`, `[#allocation3 + $0x8]`, `7`, `!1`.

    Raises:
        ScheduleError: anything else.
    """
    text = text.strip()
    register = _REGISTER.match(text)
    if register:
        inverted, key = register.groups()
        if not inverted:
            return lambda r: r.get(key)
        return lambda r: None if r.get(key) is None else int(not r[key])
    place = _ALLOCATION.match(text)
    if place:
        address = allocation(int(place[1])) + (integer(place[2]) if place[2] else 0)
        return lambda _: address
    try:
        if text.startswith("!"):
            opposite = int(not integer(text[1:]))
            return lambda _: opposite
        constant = _wrap(integer(text))
    except ValueError:
        if re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?|nan|-?inf", text):
            return lambda _: None  # a float decides nothing that we follow
        raise ScheduleError(f"cannot read the operand {text!r}") from None
    return lambda _: constant


def _wrap(x: int) -> int:
    """Signed 32 bits; addresses stay as they are."""
    if abs(x) >= _ADDRESS // 2:
        return x
    return (x + 2**31) % 2**32 - 2**31


def _u(x: int) -> int:
    return x % 2**32 if abs(x) < _ADDRESS // 2 else x


_BINARY: dict[str, Callable[[int, int], int]] = {
    "sadd": lambda a, b: _wrap(a + b),
    "ssub": lambda a, b: _wrap(a - b),
    "smul": lambda a, b: _wrap(a * b),
    "smulhi": lambda a, b: _u(a) * _u(b) >> 32,
    "sand": lambda a, b: _wrap(_u(a) & _u(b)),
    "sor": lambda a, b: _wrap(_u(a) | _u(b)),
    "sxor": lambda a, b: _wrap(_u(a) ^ _u(b)),
    "sshll": lambda a, b: _wrap(a << b),
    "sshrl": lambda a, b: _u(a) >> b,
    "sshra": lambda a, b: a >> b,
    "smin": min,
    "smax": max,
    "scalar_lea": lambda a, b: a + b,
    "por": lambda a, b: a | b,
    "pand": lambda a, b: a & b,
    "pxor": lambda a, b: a ^ b,
    "pnand": lambda a, b: 1 - (a & b),
    "pnor": lambda a, b: 1 - (a | b),
}
# A predicate operation may be decided by one operand alone.
_ABSORBING = {"por": (1, 1), "pand": (0, 0), "pnand": (0, 1), "pnor": (1, 0)}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


def _binary(opcode: str) -> Callable[[int, int], int] | None:
    family, _, kind = opcode.partition(".")
    if family == "scmp":
        how, _, kind = kind.partition(".")
        compare = _COMPARE[how]
        if kind.startswith("u32"):
            return lambda a, b: int(compare(_u(a), _u(b)))
        return lambda a, b: int(compare(a, b))
    function = _BINARY.get(family)
    if function is None:
        return None
    if kind == "u32" and family in ("smin", "smax"):
        return lambda a, b: _wrap(function(_u(a), _u(b)))
    return function


def clean(text: str) -> str:
    """An instruction's operands without comments."""
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL).strip()


def split(text: str) -> list[str]:
    """Operands between top-level commas."""
    return [part.strip() for part in re.split(r",(?![^\[(]*[\])])", text)]


def predicate(text: str) -> tuple[Read | None, str]:
    """`(%p1_p2), rest` -> how to read the predicate (None: always), and the rest."""
    match = re.match(r"\(([^(),]*)\),?\s*(.*)$", text, re.DOTALL)
    if not match:
        return None, text
    return operand(match[1]), match[2]


def compute(instruction: Instruction) -> tuple[Read | None, Read]:
    """The predicate and the value of an instruction that only computes.

    An opcode that is not modelled gives an unknown value.
    """
    family = instruction.opcode.partition(".")[0]
    text = clean(instruction.rest)
    if family == "smov" and text.startswith("("):
        # smov (p, old), new: the register keeps `old` where p is false.
        inside, _, new = text[1:].partition(")")
        when, comma, _ = inside.partition(",")
        if comma:
            return operand(when), operand(new.lstrip(", "))
    when, text = predicate(text)
    if family == "scalar_lea":
        text = re.sub(r"\s+\[#\w+\]$", "", text)  # which allocation the sum is in
    operation = _binary(instruction.opcode)
    if family not in ("smov", "pmov", "pneg", "scalar_select") and not operation:
        return when, lambda _: None
    reads = [operand(part) for part in split(text)]
    if family in ("smov", "pmov"):
        return when, reads[0]
    if family == "pneg":
        return when, lambda r: None if (x := reads[0](r)) is None else 1 - x
    if family == "scalar_select":
        return when, lambda r: _select(reads, r)
    assert operation is not None
    absorbing = _ABSORBING.get(family)

    def value(r: Registers) -> Value:
        a, b = reads[0](r), reads[1](r)
        if a is None or b is None:
            if absorbing and absorbing[0] in (a, b):
                return absorbing[1]
            return None
        return operation(a, b)

    return when, value


def _select(reads: list[Read], registers: Registers) -> Value:
    which = reads[0](registers)
    return None if which is None else reads[1 if which else 2](registers)
