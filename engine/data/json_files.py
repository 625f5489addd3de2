"""JSON files, one object a line or one list of them, read to the letter."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from engine.data.columns import FIELDS, Renamed, check_names
from engine.data.text_files import AS_NAMED, PackedRows, read_text
from engine.errors import InputError, one_line

_OF_MESSAGES = ("role", "content", "from", "value", "loss_weight")

Unique = Callable[[list[tuple[str, Any]]], dict[str, Any]]


def read_json(path: str, name: str, renamed: Renamed = AS_NAMED) -> PackedRows:
    """The rows of a file with one JSON object a line, or one JSON list of objects.

    Raises:
        InputError: a line or a list that is not JSON, an entry that is no object, or
            what `read_text` refuses; it names the line.
    """
    text = read_text(path, name)
    start = text.lstrip()[:1]
    columns: dict[str, None] = {}  # of the file
    unique = _unique((*FIELDS, *_OF_MESSAGES, *renamed.names.values()))

    def rows() -> Iterator[tuple[dict[str, Any], Iterable[str]]]:
        read = _entries if start == "[" else _lines
        for place, row in read(text, name, unique):
            if not isinstance(row, dict):
                raise InputError(
                    f"{name}, {place}, holds a {type(row).__name__}; each must be an "
                    'object with "chosen", "rejected" and mostly "prompt"'
                )
            columns.update(dict.fromkeys(row))
            own, row = row, renamed.row(row)
            messages = isinstance(row.get("chosen"), list | dict)
            try:
                check_names(f"{name}, {place}", row, messages)
            except InputError:
                renamed.check(f"{name}, {place},", own)  # a wrong name is the cause
                raise
            yield row, row

    if not start:
        raise InputError(f"{name} is empty; give at least one preference pair")
    found = PackedRows.of(rows())
    renamed.check(name, columns)
    return found


def _lines(text: str, name: str, unique: Unique) -> Iterator[tuple[str, Any]]:
    """(where, value) of each line that is not blank."""
    # Not splitlines(): JSON strings may hold U+2028 and others of its line breaks.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", _parsed(line, name, number, unique)


def _entries(text: str, name: str, unique: Unique) -> Iterator[tuple[str, Any]]:
    """(where, value) of each entry of a JSON list."""
    for number, value in enumerate(_parsed(text, name, 1, unique)):
        yield f"entry {number} of its list (counting from 0)", value


class _Twice(Exception):
    """A key that one JSON object has twice."""


def _unique(keys: Iterable[str]) -> Unique:
    """What makes objects of which none of `keys` is there twice."""
    keys = tuple(keys)

    def make(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            for key in keys:
                if [name for name, _ in pairs].count(key) > 1:
                    raise _Twice(key)
        return found

    return make


def _parsed(text: str, name: str, first_line: int, unique: Unique) -> Any:
    try:
        return json.loads(text, object_pairs_hook=unique)
    except _Twice as error:
        raise InputError(
            f"{name}, line {first_line}: an object has the key {str(error)!r} twice; "
            "give each key once"
        ) from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{name}, line {first_line + error.lineno - 1}, is not JSON ({error.msg}, "
            f"column {error.colno}); write one object a line, or one list of objects"
        ) from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise InputError(
            f"{name}, line {first_line}, cannot be read: {one_line(error)}"
        ) from None
    except RecursionError:
        raise InputError(
            f"{name}, line {first_line}, is JSON nested too deeply to be read"
        ) from None
