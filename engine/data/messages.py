"""Messages of a conversation, in each notation that is read, as chat templates take it.

That is `{"role": ..., "content": text or text parts}`, with `tool_calls` where a model
calls tools. ShareGPT's `from` and `value`, and parts whose text is called `value` (as
in LLaMA-Factory's files), become that.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from engine.errors import InputError, library_errors, one_line, shown

_RULE = 'a message is {"role": "user" or another, "content": text}'
_FROM_RULE = 'a message is {"from": "human" or another, "value": text}'
# ShareGPT's names of roles, and those that stand there as often.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_SHAREGPT_ROLES = ("human", "gpt", "system", "function_call", "observation")


class Messages(NamedTuple):
    """A list of messages, and the numbers of those whose `loss_weight` is 0."""

    messages: list[dict[str, Any]]
    unscored: frozenset[int] = frozenset()


def read_messages(value: Sequence[Any], where: str) -> Messages:
    """Well-formed messages, without the keys that Arrow has filled in with None.

    Raises:
        InputError: a message that is none; it begins with `where`.
    """
    found, unscored = [], set()
    for number, message in enumerate(value):
        place = f"{where}, message {number}"
        if not isinstance(message, Mapping):
            raise InputError(f"{place}, is {kind(message)}; {_RULE}")
        # Where rows differ, Arrow fills in the keys of the others.
        message = {k: v for k, v in message.items() if v is not None}
        if not _loss_weight(message.pop("loss_weight", 1), place):
            unscored.add(number)
        found.append(_message(message, place))
    return Messages(found, frozenset(unscored))


def _loss_weight(weight: Any, place: str) -> bool:
    """Whether it is 1 and not 0."""
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        weight = short(weight)
    elif weight in (0, 1):
        return bool(weight)
    raise InputError(
        f"{place}, field 'loss_weight', is {weight}; it must be 1 (scored, where score "
        "has it so) or 0 (not scored)"
    )


def _message(message: dict[str, Any], place: str) -> dict[str, Any]:
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, place)
    for key, other in (("role", "from"), ("content", "value")):
        if key not in message and not (key == "content" and "tool_calls" in message):
            hint = f": rename {other!r} to {key!r}" if other in message else ""
            raise InputError(f"{place}, has no {key!r}; {_RULE}{hint}")
    if not isinstance(message["role"], str):
        raise InputError(f"{place}, has the role {short(message['role'])}; {_RULE}")
    content = message.get("content", "")
    if isinstance(content, str):
        return message
    return message | {"content": _parts(content, place)}


def _parts(content: Any, place: str) -> list[dict[str, Any]]:
    parts = []
    for part in content if isinstance(content, list) else [None]:
        text = None
        if isinstance(part, Mapping) and part.get("type") == "text":
            texts = [part[k] for k in ("text", "value") if part.get(k) is not None]
            text = texts[0] if len(texts) == 1 else None
        if not isinstance(text, str):
            raise InputError(
                f"{place}, has the content {short(content)}; {_RULE}, or a list of "
                '{"type": "text", "text": text} (images and sound are not read)'
            )
        parts.append({"type": "text", "text": text})
    return parts


def _from_sharegpt(message: dict[str, Any], place: str) -> dict[str, Any]:
    role, value = message.pop("from"), message.pop("value", None)
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(
            f"{place}, is from {short(role)}; that must be one of "
            f"{', '.join(_SHAREGPT_ROLES)}"
        )
    if value is None:
        raise InputError(f"{place}, has no 'value'; {_FROM_RULE}")
    message["role"] = _ROLES[role]
    if role == "function_call":
        return message | {"tool_calls": _tool_calls(value, place)}
    return message | {"content": value}


def _tool_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """The calls that a message from function_call holds as JSON."""
    rule = 'a function_call holds {"name": ..., "arguments": {...}} as JSON, or a list'
    if isinstance(value, str):
        with library_errors(
            lambda error: f"{place}, is not JSON ({one_line(error)}); {rule}"
        ):
            value = json.loads(value)
    calls = value if isinstance(value, list) else [value]
    found = []
    for call in calls:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise InputError(f"{place}, holds {short(call)}; {rule}")
        function = {"name": call["name"], "arguments": call.get("arguments") or {}}
        found.append({"type": "function", "function": function})
    return found


def said(message: Mapping[str, Any]) -> str:
    """A message's text, its parts joined, without the white space around it."""
    content = message.get("content", "")
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(part["text"] for part in parts).strip()


def kind(value: Any) -> str:
    """What a value is, in words, for messages."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "a list of messages"
    return f"{short(value)} (a {type(value).__name__})"


def short(value: Any) -> str:
    """`shown`, cut where it is long."""
    text = shown(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
