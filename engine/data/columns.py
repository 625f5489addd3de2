"""Columns: which are read, under which names, and which are surely a needed one.

A column that is surely `prompt` under another name is not to be ignored: `promt`,
`prompts`, or (`question`, `instruction`, `query`, `input`) what others call it. The
latter are refused only beside answers that are text. Answers that are lists of messages
begin with the prompt where there is no column of that name, or are refused for not
doing so; what else is called a question there repeats a part of it.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from engine.config.fields import did_you_mean
from engine.errors import InputError

_NEEDED = ("prompt", "chosen", "rejected")


class Form(NamedTuple):
    """A way to write down a pair."""

    needs: tuple[str, ...]
    may_have: tuple[str, ...] = ()

    def is_in(self, columns: Iterable[str]) -> bool:
        """Whether the needed columns are all there."""
        return set(self.needs) <= set(columns)


def _ids(ending: str, *more: str) -> Form:
    return Form(tuple(f"{side}_{ending}" for side in _NEEDED), more)


MASKS = ("prompt_attention_mask", "chosen_attention_mask", "rejected_attention_mask")
IDS = (_ids("ids"), _ids("input_ids", *MASKS))
SHAREGPT = Form(("conversations", "chosen", "rejected"), ("system",))
PAIR = Form(("chosen", "rejected"), ("prompt",))
MESSAGES = Form(("chosen_messages", "rejected_messages"))
# Of the forms that a row has, the first is read.
FORMS = (*IDS, SHAREGPT, PAIR, MESSAGES)
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
OF_ANY_FORM = ("tools", "chat_template_kwargs", "weight", *REFERENCE)

# Every column that is read.
FIELDS = tuple(
    dict.fromkeys(
        [
            "prompt",
            "chosen",
            "rejected",
            *(name for form in FORMS for name in (*form.needs, *form.may_have)),
            *OF_ANY_FORM,
        ]
    )
)

_ALSO_CALLED = {"prompt": ("question", "instruction", "query", "input")}
_NEAR = 0.8  # likeness from which one word is a slip of another: promt, prompts


def form_of(columns: Iterable[str]) -> Form | None:
    """The form that is read of these columns; None if they are no whole one."""
    columns = set(columns)
    if "prompt" in columns and not any(form.is_in(columns) for form in IDS):
        columns -= {"conversations"}  # with a prompt of its own, it is something else
    return next((form for form in FORMS if form.is_in(columns)), None)


class Renamed:
    """The columns of a source under the names that are read.

    Args:
        names: by the name that is read, the file's own; all others stay.
    """

    def __init__(self, names: Mapping[str, str] | None = None):
        self.names = dict(names or {})

    def check(self, where: str, columns: Iterable[str]):
        """Refuses a file that lacks a column which is to be read.

        Raises:
            InputError: naming the column, and those that there are.
        """
        columns = list(columns)
        for name, column in self.names.items():
            if column not in columns:
                raise InputError(
                    f"{where} has no column {column!r}, which columns.{name} names"
                    f"{did_you_mean(column, columns)}; it has {', '.join(columns)}"
                )

    def row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row under the names that are read; a file's column of such is not."""
        if not self.names:
            return dict(row)
        left_out = {*self.names, *self.names.values()}
        found = {k: v for k, v in row.items() if k not in left_out}
        return found | {k: row[c] for k, c in self.names.items() if c in row}


def check_names(where: str, columns: Iterable[str], answers_are_messages: bool = False):
    """Refuses a column that is a missing field under a slightly other name.

    Args:
        where: the file, or row, that has these columns.
        answers_are_messages: whether chosen holds messages, and not text.
    Raises:
        InputError: naming the column, and what to rename it to.
    """
    found = _misnamed(tuple(columns), answers_are_messages)
    if found is None:
        return
    column, field = found
    way_out = f", or name it in the run file (columns: {{{field}: {column.strip()}}})"
    if field == "prompt":
        way_out += ", or remove it if chosen and rejected both start with the prompt"
    raise InputError(
        f"{where}, has no {field!r}, but {column!r}, which is not read; rename it to "
        f"{field!r}{way_out}"
    )


@lru_cache(maxsize=256)
def _misnamed(columns: tuple[str, ...], messages: bool) -> tuple[str, str] | None:
    form = form_of(columns)
    if form is not None and form != PAIR:
        return None
    for field in ("chosen", "rejected", "prompt"):
        if field in columns:
            continue
        for column in columns:
            if column not in _NEEDED and _means(column, field, messages):
                return column, field
    return None


def _means(column: str, field: str, messages: bool) -> bool:
    name = re.sub(r"[\s\ufeff\u200b]+", "", column).casefold()
    if name == field or (name in _ALSO_CALLED.get(field, ()) and not messages):
        return True
    # Several words are another thing: prompt_id, score_chosen.
    return (
        name.isalpha() and difflib.SequenceMatcher(None, name, field).ratio() >= _NEAR
    )
