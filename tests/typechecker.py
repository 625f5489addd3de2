"""What checks annotated functions under pytest; named in pyproject.toml."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# As for static checkers, a float parameter takes an int.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked[F: Callable[..., Any]](function: F) -> F:
    """The function, which checks what it is given and gives; a closure as it is.

    A check is written and compiled where a function is defined, so that of a closure
    each time: a fifth of what a short run took was that.
    """
    return function if "<locals>" in function.__qualname__ else _check(function)
