"""Values of a `config.json`, each checked to be of its kind."""

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from engine.errors import InputError


def is_positive(value: Any) -> TypeGuard[float]:
    """A finite number above 0, as JSON has them; true and false are none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


def integer(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer above 0; null is as if the key were not there."""
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise InputError(
            f"config.json: {key} is missing; it must be an integer above 0"
        )
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"config.json: {key}={value!r} must be an integer above 0")
    return value


def number(values: Mapping[str, Any], key: str, default: float | None) -> float | None:
    """A positive number; null, when the key is there, means none."""
    value = values.get(key, default)
    if value is None:
        return None
    if not is_positive(value):
        raise InputError(f"config.json: {key}={value!r} must be a number above 0")
    return float(value)


def flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false; null is as if the key were not there."""
    value = values.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise InputError(f"config.json: {key}={value!r} must be true or false")
    return value
