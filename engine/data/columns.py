"""Columns that are surely a needed one under another name, and so not to be ignored."""

import difflib
import re
from collections.abc import Iterable
from functools import lru_cache

from engine.errors import InputError

_NEEDED = ("chosen", "rejected", "prompt")
_ALSO_CALLED = {"prompt": ("question", "instruction", "query", "input")}
_NEAR = 0.8  # likeness from which one word is a slip of another: promt, prompts


def check_names(where: str, columns: Iterable[str]):
    """Refuses a column that is a missing field under a slightly other name.

    Args:
        where: the file, or row, that has these columns.
    Raises:
        InputError: naming the column, and what to rename it to.
    """
    found = _misnamed(tuple(columns))
    if found is None:
        return
    column, field = found
    way_out = ""
    if field == "prompt":
        way_out = ", or remove it if chosen and rejected both start with the prompt"
    raise InputError(
        f"{where}, has no {field!r}, but {column!r}, which is not read; rename it to "
        f"{field!r}{way_out}"
    )


@lru_cache(maxsize=256)
def _misnamed(columns: tuple[str, ...]) -> tuple[str, str] | None:
    for field in _NEEDED:
        if field in columns:
            continue
        for column in columns:
            if column not in _NEEDED and _means(column, field):
                return column, field
    return None


def _means(column: str, field: str) -> bool:
    name = re.sub(r"[\s\ufeff\u200b]+", "", column).casefold()
    if name == field or name in _ALSO_CALLED.get(field, ()):
        return True
    # Several words are another thing: prompt_id, score_chosen.
    return (
        name.isalpha() and difflib.SequenceMatcher(None, name, field).ratio() >= _NEAR
    )
