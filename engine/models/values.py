"""Values of a `config.json`, each checked to be of its kind."""

from collections.abc import Mapping
from typing import Any, TypeGuard

from engine.errors import InputError, shown

# Of any number: whatever is computed of a few of them is within float32 as well.
LEAST_NUMBER, MOST_NUMBER = 1e-12, 1e15
A_NUMBER = f"a finite number above 0, from {LEAST_NUMBER:g} to {MOST_NUMBER:g}"
MOST = 2**31 - 1  # of any size or count: arrays' indices have 32 bits


def is_positive(value: Any) -> TypeGuard[float]:
    """A number that a model can have, as JSON has them; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return LEAST_NUMBER <= float(value) <= MOST_NUMBER
    except OverflowError:  # JSON's integers have no end
        return False


def integer(
    values: Mapping[str, Any], key: str, default: int | None = None, most: int = MOST
) -> int:
    """An integer within 1 and `most`; null is as if the key were not there."""
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise InputError(
            f"config.json: {key} is missing; it must be an integer above 0"
        )
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(
            f"config.json: {key}={shown(value)} must be an integer above 0"
        )
    if value > most:
        raise InputError(
            f"config.json: {key}={shown(value)} is too large; at most {most} is allowed"
        )
    return value


def number(values: Mapping[str, Any], key: str, default: float | None) -> float | None:
    """A positive number; null, when the key is there, means none."""
    value = values.get(key, default)
    if value is None:
        return None
    if not is_positive(value):
        raise InputError(f"config.json: {key}={shown(value)} must be {A_NUMBER}")
    return float(value)


def flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false; null is as if the key were not there."""
    value = values.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise InputError(f"config.json: {key}={shown(value)} must be true or false")
    return value
