"""JSON files, one object a line or one list of them, read to the letter."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from engine.data.columns import FIELDS, Renamed, check_names
from engine.data.text_files import AS_NAMED, PackedRows, read_text, text_lines
from engine.errors import InputError, one_line

_OF_MESSAGES = ("role", "content", "from", "value", "loss_weight")

_SEEN = 1000  # rows of a stream among which a column must be that is named

Unique = Callable[[list[tuple[str, Any]]], dict[str, Any]]


def read_json(path: str, name: str, renamed: Renamed = AS_NAMED) -> PackedRows:
    """The rows of a file with one JSON object a line, or one JSON list of objects.

    Raises:
        InputError: a line or a list that is not JSON, an entry that is no object, or
            what `text_lines` refuses; it names the line.
    """
    return PackedRows.of((row, row) for row in json_rows(path, name, renamed))


def json_rows(
    path: str, name: str, renamed: Renamed = AS_NAMED, *, streamed: bool = False
) -> Iterator[dict[str, Any]]:
    """The rows of `read_json`, one at a time.

    Args:
        streamed: hold one line at a time, and refuse a list, which is one; look for the
            columns that are named among the first thousand rows, not at the end.
    Raises:
        InputError: as `read_json`.
    """
    unique = _unique((*FIELDS, *_OF_MESSAGES, *renamed.names.values()))
    columns: dict[str, None] = {}  # of the file
    number = 0
    for place, row in _objects(path, name, unique, streamed):
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
        number += 1
        if streamed and number == _SEEN:
            renamed.check(f"{name}, in its first {_SEEN} rows,", columns)
        yield row
    renamed.check(name, columns)


def _objects(
    path: str, name: str, unique: Unique, streamed: bool
) -> Iterator[tuple[str, Any]]:
    """(where, value) of each line that is not blank, or of each entry of a list."""
    # Not splitlines(): JSON strings may hold U+2028 and others of its line breaks.
    empty = True
    for number, line in enumerate(text_lines(path, name), 1):
        if not line.strip():
            continue
        if empty and line.lstrip()[:1] == "[":
            if streamed:
                raise InputError(
                    f"{name} is one list, of which nothing is read before its end, so "
                    "that it cannot be streamed; write one object a line"
                )
            yield from _entries(read_text(path, name), name, unique)
            return
        empty = False
        yield f"line {number}", _parsed(line.removesuffix("\n"), name, number, unique)
    if empty:
        raise InputError(f"{name} is empty; give at least one preference pair")


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
