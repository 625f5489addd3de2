"""Rows as preference pairs, whichever form they are written in: see `columns.FORMS`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.data.columns import IDS, MESSAGES, PAIR, SHAREGPT, Form
from engine.data.id_pairs import PairIds, read_id_pairs
from engine.data.messages import Messages, kind, read_messages, short
from engine.data.templates import TAKEN_ARGUMENTS
from engine.errors import InputError, library_errors, one_line


@dataclass(frozen=True, kw_only=True)
class PairRow:
    """A pair of texts, or of messages; `prompt` is None where both begin with it."""

    prompt: str | Messages | None
    chosen: str | Messages
    rejected: str | Messages
    tools: list[Any] | None = None
    arguments: Mapping[str, Any]  # of the chat template
    weight: float = 1.0


def read_pairs(row: Mapping[str, Any], where: str) -> list[PairRow] | list[PairIds]:
    """The pairs of a row: one for each rejected answer.

    Raises:
        InputError: a row that holds no pair; it begins with `where`.
    """
    weight = _weight(row.get("weight"), where)
    form = _form_of(row)
    if form in IDS:
        return read_id_pairs(row, form, weight, where)
    fields = {k: _plain(row[k]) for k in (*form.needs, *form.may_have) if k in row}
    for name in form.needs:
        if name not in row:
            raise InputError(
                f"{where}, has no {name!r}, only {', '.join(map(repr, row))}; each row "
                "needs chosen, rejected and (unless both start with it) prompt"
            )
    chosen, rejected = (name for name in form.needs if name != "conversations")
    prompt = None
    if form == SHAREGPT:
        prompt = _conversation(fields, where)
    elif form == PAIR and "prompt" in row:
        prompt = _side(row["prompt"], "prompt", where)
    first = _answer(fields[chosen], chosen, where, form)
    tools, arguments = read_tools(row.get("tools"), where), _arguments(row, where)
    return [
        PairRow(
            prompt=prompt,
            chosen=first,
            rejected=_answer(other, rejected, where, form),
            tools=tools,
            arguments=arguments,
            weight=weight,
        )
        for other in _several(fields[rejected], rejected, where)
    ]


def _form_of(row: Mapping[str, Any]) -> Form:
    """The form of one row; where it is no whole one, the one that it is nearest to."""
    there = {name for name, value in row.items() if value is not None}
    for form in IDS:
        if there & set(form.needs):
            return form
    if "conversations" in there and "prompt" not in there:
        return SHAREGPT
    if row.keys() & set(PAIR.needs) or not there & set(MESSAGES.needs):
        return PAIR
    return MESSAGES


def _plain(value: Any) -> Any:
    """One message that stands alone as a list of it."""
    return [value] if isinstance(value, Mapping) else value


def _several(value: Any, field: str, where: str) -> list[Any]:
    """The rejected answers: a list of messages is one, a list of lists several."""
    if not isinstance(value, list | tuple) or not value:
        return [value]
    if any(all(isinstance(x, one) for x in value) for one in (str, list | tuple)):
        return list(value)
    if any(isinstance(x, str | list | tuple) for x in value):
        raise InputError(
            f"{where}, field {field!r}, holds entries of several kinds; give one "
            "answer (text, or a list of messages) or a list of such"
        )
    return [value]


def _answer(value: Any, field: str, where: str, form: Form) -> str | Messages:
    side = _side(_plain(value), field, where)
    if form != SHAREGPT:
        if form == MESSAGES and isinstance(side, str):
            raise InputError(
                f"{where}, field {field!r}, is text; it must be a list of messages"
            )
        return side
    if isinstance(side, str):
        side = Messages([{"role": "assistant", "content": side}])
    role = side.messages[0]["role"]
    if role != "assistant":
        raise InputError(
            f"{where}, field {field!r}, begins with a message of the role {role!r}; an "
            "answer must be from gpt or function_call"
        )
    return side


def _side(value: Any, field: str, where: str) -> str | Messages:
    """A required field: text, or well-formed messages."""
    if isinstance(value, str):
        return value
    place = f"{where}, field {field!r}"
    numbers = isinstance(value, Sequence) and value and isinstance(value[0], int)
    if isinstance(value, bytes | bytearray) or numbers:
        found = "a list of numbers, as token ids are"
        way_out = "decode it, or call the columns prompt_ids, chosen_ids, rejected_ids"
        if isinstance(value, bytes | bytearray):
            found, way_out = f"bytes ({short(value)})", "decode it"
        raise InputError(
            f"{place}, is {found}; it must be text or a list of messages: {way_out}"
        )
    if not isinstance(value, Sequence):
        raise InputError(
            f"{place}, is {kind(value)}; it must be text or a list of messages: "
            "correct the row or leave it out"
        )
    if len(value) == 0:
        raise InputError(f"{place}, is an empty list; give at least one message")
    return read_messages(value, place)


def _conversation(row: Mapping[str, Any], where: str) -> Messages:
    """ShareGPT's turns before the answer, and the column `system` before them.

    Raises:
        InputError: turns that do not alternate, or that end with an answer.
    """
    field = "conversations"
    if not isinstance(row[field], Sequence) or isinstance(row[field], str):
        raise InputError(
            f"{where}, field {field!r}, is {kind(row[field])}; it must be a list of "
            "messages"
        )
    found = _side(row[field], field, where)
    assert isinstance(found, Messages)
    messages, unscored = found
    own = messages[0]["role"] == "system"
    for number, message in enumerate(messages[own:]):
        asks = message["role"] in ("user", "tool")
        if asks != (number % 2 == 0) or message["role"] == "system":
            raise InputError(
                f"{where}, field {field!r}, message {number + own}, is of the role "
                f"{message['role']!r}; after a system message, human (or observation) "
                "and gpt (or function_call) must take turns, human first"
            )
    if len(messages) == own or messages[-1]["role"] == "assistant":
        raise InputError(
            f"{where}, field {field!r}, must end with a message from human or "
            "observation, which chosen and rejected answer"
        )
    system = row.get("system")
    if system is None or system == "":
        return found
    if not isinstance(system, str):
        raise InputError(f"{where}, field 'system', is {kind(system)}; give text")
    if own:
        raise InputError(
            f"{where}, has a field 'system' and a system message in {field!r}; leave "
            "one of them out"
        )
    shifted = frozenset(number + 1 for number in unscored)
    return Messages([{"role": "system", "content": system}, *messages], shifted)


def read_tools(tools: Any, where: str) -> list[Any] | None:
    """Tools for the chat template, which may be a list or that list as JSON.

    Raises:
        InputError: beginning with `where`, which names the row.
    """
    if isinstance(tools, str):
        if not tools.strip():
            return None  # a cell that is empty
        with library_errors(
            lambda error: (
                f"{where}, field 'tools', is not JSON ({one_line(error)}); give a "
                "list of tools, as JSON or not"
            )
        ):
            tools = json.loads(tools)
    if tools is not None and not isinstance(tools, list):
        raise InputError(
            f"{where}, field 'tools', is {kind(tools)}; give a list of tools, or null"
        )
    return tools


def _arguments(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    arguments = row.get("chat_template_kwargs")
    if arguments is None:
        return {}
    place = f"{where}, field 'chat_template_kwargs'"
    if not isinstance(arguments, Mapping):
        raise InputError(
            f"{place}, is {kind(arguments)}; give a mapping of the chat template's "
            "arguments, or null"
        )
    arguments = {k: v for k, v in arguments.items() if v is not None}
    for name in arguments:
        if name in TAKEN_ARGUMENTS:
            raise InputError(
                f"{place}, has {name!r}, which says how the template is called and is "
                "not an argument of it; remove it"
            )
    return arguments


def _weight(value: Any, where: str) -> float:
    """How often a pair counts; 1 where nothing is said."""
    if value is None:
        return 1.0
    number = value
    if isinstance(value, str):  # a cell of a CSV file
        try:
            number = float(value)
        except ValueError:
            number = None
    if isinstance(number, bool) or not isinstance(number, int | float | np.number):
        number = math.nan
    # As batches hold it: neither infinite nor, unless it is 0, rounded to nothing.
    with np.errstate(over="ignore", under="ignore"):
        held = np.float32(min(float(number), 1e300) if number == number else math.nan)
    if not 0 <= held < np.inf or (held == 0) != (number == 0):
        raise InputError(
            f"{where}, field 'weight', is {short(value)}; it must be a finite number "
            "of at least 0: how often the pair counts (float32)"
        )
    return float(held)
