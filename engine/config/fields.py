"""Checks that every configuration dataclass shares: types, ranges, near names.

A message starts with the name of the field that is wrong, so that whoever knows where
the value came from (a file, the command line) can put that in front of it.
"""

import dataclasses
import difflib
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from engine.config.aliases import other_name
from engine.errors import InputError, shown

COUNT_LIMIT = 2**31  # of what is counted: arrays and JAX's counters are 32 bits wide
_INT64 = 2**63
_FLOAT32 = np.finfo(np.float32)

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a string",
    dict: "a mapping",
    type(None): "null",
}


def refuses_unknown[Config](cls: type[Config]) -> type[Config]:
    """Decorates a dataclass: an unknown option is an InputError that leads to ours."""
    plain, names = (
        cls.__init__,
        [f.name for f in dataclasses.fields(typing.cast(Any, cls))],
    )

    @functools.wraps(plain)
    def init(self, **options):
        for name in options:
            if name not in names:
                hint = other_name(name).replace("'trainer.", "'")
                hint = hint or did_you_mean(name, names)
                known = "; known: " + ", ".join(names)
                raise InputError(f"{name}: no such option{hint or known}")
        plain(self, **options)

    cls.__init__ = init
    return cls


def check_types(config: Any) -> None:
    """Replaces each field of a frozen dataclass by its value as the declared type.

    A whole number becomes a float where a float is declared, and so does a string such
    as "1e-6", which YAML 1.1 does not read as a number. Lists become tuples.

    Raises:
        InputError: a value that is not of the declared type.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = convert(getattr(config, field.name), hints[field.name], field.name)
        object.__setattr__(config, field.name, value)


def convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as the type `hint`; `name` is the field, for the message.

    Raises:
        InputError: where no reading of `value` is of that type.
    """
    for option in _options(hint):
        if typing.get_origin(option) is tuple:
            if isinstance(value, Sequence) and not isinstance(value, str):
                item = typing.get_args(option)[0]
                return tuple(
                    convert(v, item, f"{name}.{i}") for i, v in enumerate(value)
                )
        else:
            found, result = _scalar(value, option)
            if found:
                return result
    if isinstance(value, numbers.Integral) and {int, float} & {*_options(hint)}:
        if not isinstance(value, bool):  # the type is right
            raise InputError(f"{name}={shown(value)} is too large; give a smaller one")
    raise InputError(
        f"{name}={shown(value)} must be {describe(hint)}{_near(value, hint)}"
    )


def describe(hint: Any) -> str:
    """What a value of type `hint` looks like, in words."""
    words = []
    for option in _options(hint):
        if typing.get_origin(option) is tuple:
            words.append(f"a list, each entry {describe(typing.get_args(option)[0])}")
        elif typing.get_origin(option) is Literal:
            words.append(f"one of {', '.join(typing.get_args(option))}")
        else:
            words.append(_WORDS.get(option) or f"a {option.__name__}")
    return " or ".join(words)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuses a name that is not among `choices`, and offers the nearest one."""
    convert(value, Literal[tuple(choices)], name)


def check_positive(config: Any, *names: str) -> None:
    """Refuses fields (None allowed) that are zero or negative."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise InputError(f"{name}={value!r} must be greater than 0")


def check_count(config: Any, *names: str, low: int = 1) -> None:
    """Refuses fields (None allowed) that count fewer than `low` or too many."""
    if low == 1:
        check_positive(config, *names)
    check_within(config, low, COUNT_LIMIT, *names)


def check_float32(config: Any) -> None:
    """Refuses floats that float32, in which training computes, cannot hold."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not isinstance(value, float) or value == 0:
            continue
        low, high = float(_FLOAT32.smallest_normal), float(_FLOAT32.max)
        if not low <= abs(value) <= high:
            becomes = "0" if abs(value) < low else "infinite"
            raise InputError(
                f"{field.name}={value!r} is {becomes} in float32, in which training "
                f"computes; give a number within {low:.3g} and {high:.3g}, or 0 where "
                "that is allowed"
            )


def check_within(config: Any, low: float, high: float, *names: str) -> None:
    """Refuses fields (None allowed) outside low <= value < high."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value < high:
            bound = "" if high == math.inf else f" and below {high}"
            raise InputError(f"{name}={value!r} must be at least {low}{bound}")


def check_unused(config: Any, reason: str, *names: str) -> None:
    """Refuses fields that are not at their default although nothing reads them."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        value = getattr(config, name)
        if value != defaults[name]:
            raise InputError(f"{name}={value!r} has no effect {reason}; remove it")


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {prefix + near[0]!r}?" if near else ""


def _near(value: Any, hint: Any) -> str:
    names = [
        name
        for option in _options(hint)
        if typing.get_origin(option) is Literal
        for name in typing.get_args(option)
    ]
    return did_you_mean(value, names) if isinstance(value, str) else ""


def _options(hint: Any) -> Sequence[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _scalar(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether `value` reads as a `kind`, and the reading."""
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind), value
    if kind not in (int, float):
        return isinstance(value, kind), value
    if isinstance(value, bool):  # which Python counts as an int
        return False, None
    if kind is int:
        whole = int(value) if isinstance(value, numbers.Integral) else None
        return whole is not None and -_INT64 <= whole < _INT64, whole
    if isinstance(value, str) and re.match(r"[-+]?0[0-9]", value):
        return False, None  # 010: eight to some readers, ten to others
    if not isinstance(value, str | numbers.Real):
        return False, None
    try:
        value = float(value)
    except (ValueError, OverflowError):
        return False, None
    return math.isfinite(value), value
