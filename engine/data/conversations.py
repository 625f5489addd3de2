"""One preference row as three texts: the prompt, and the prompt with each completion.

The rules are TRL's: `extract_prompt` and `DPOTrainer._prepare_dataset` of trl 1.16.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from engine.data.templates import ChatTemplate
from engine.errors import InputError, library_errors, one_line


class Texts(NamedTuple):
    """The texts to tokenise; the last two begin with the prompt (or nearly so)."""

    prompt: str
    chosen: str
    rejected: str
    templated: bool  # rendered by a chat template, which has put in every special token


def row_texts(
    row: Mapping[str, Any], where: str, template: ChatTemplate, eos: str | None
) -> Texts:
    """The texts of one row; plain-text completions end with `eos`, once.

    Raises:
        InputError: a row that is not a preference pair, that the template refuses or
            leaves words of out, or that has half a character; it begins with `where`.
    """
    chosen = _field(row, "chosen", where)
    rejected = _field(row, "rejected", where)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise InputError(
            f"{where}, field 'rejected', is {_kind(rejected)}, but chosen is "
            f"{_kind(chosen)}; make both text or both lists of messages"
        )
    prompt = _field(row, "prompt", where) if "prompt" in row else None
    if isinstance(chosen, str) and isinstance(rejected, str):
        texts = _plain_texts(prompt, chosen, rejected, where, eos)
    else:
        assert isinstance(chosen, list) and isinstance(rejected, list)
        texts = _templated_texts(row, prompt, chosen, rejected, where, template)
    for field, text in zip(("prompt", "chosen", "rejected"), texts[:3], strict=True):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where}, field {field!r}, has half a character "
                f"(\\u{ord(text[error.start]):04x}, a surrogate on its own), which no "
                "tokenizer takes; mend the text, which was cut or decoded wrongly"
            ) from None
    return texts


def _plain_texts(
    prompt: str | list[dict] | None,
    chosen: str,
    rejected: str,
    where: str,
    eos: str | None,
) -> Texts:
    if prompt is None:
        prompt, chosen, rejected = split_text(chosen, rejected)
    if not isinstance(prompt, str):
        raise InputError(
            f"{where}, field 'prompt', is a list of messages, but chosen is text; "
            "make all three text or all three lists of messages"
        )
    if eos is None:
        raise InputError(
            f"{where}, is plain text, whose end the tokenizer cannot mark: it has "
            "no eos_token; set it in tokenizer_config.json, or give messages"
        )
    chosen = chosen if chosen.endswith(eos) else chosen + eos
    rejected = rejected if rejected.endswith(eos) else rejected + eos
    return Texts(prompt, prompt + chosen, prompt + rejected, templated=False)


def _templated_texts(
    row: Mapping[str, Any],
    prompt: str | list[dict] | None,
    chosen: list[dict],
    rejected: list[dict],
    where: str,
    template: ChatTemplate,
) -> Texts:
    if isinstance(prompt, list):
        messages = prompt
    else:
        shared = _shared_turns(chosen, rejected, where)
        messages, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if prompt is not None and prompt.strip() not in map(said, messages):
            raise InputError(
                f"{where}, field 'prompt', is text that is no message of what chosen "
                "and rejected start with; give messages, or leave the column out"
            )
    if not template.exists:
        raise InputError(
            f"{where}, holds lists of messages, but the tokenizer has no chat "
            "template; name one that has in model.tokenizer (an instruct model's), "
            "or give prompt, chosen and rejected as text"
        )
    tools, arguments = _tools(row, where), _arguments(row, where)

    def render(field: str, messages: list[dict], **options: bool) -> str:
        try:
            return template.render(messages, tools, arguments, **options)
        except ValueError as error:
            if arguments and _renders(template, messages, tools, options):
                field = "chat_template_kwargs"
            raise InputError(_refused(where, field, error)) from error

    start = render("prompt", messages, add_generation_prompt=True)
    # Templates leave the reasoning of earlier answers out, as they are meant to.
    asked = [i for i, m in enumerate(messages) if m["role"] != "assistant"]

    def render_asked(changed: list[dict]) -> str:
        copy = list(messages)
        for i, message in zip(asked, changed, strict=True):
            copy[i] = message
        return template.render(copy, tools, arguments)

    template.check_words(
        f"{where}, field 'prompt'", [messages[i] for i in asked], start, 0, render_asked
    )
    texts = []
    for field, answer in (("chosen", chosen), ("rejected", rejected)):
        text = render(field, messages + answer)
        template.check_words(
            f"{where}, field {field!r}",
            answer,
            text,
            len(start) if text.startswith(start) else None,
            lambda answer: template.render(messages + answer, tools, arguments),
        )
        texts.append(text)
    return Texts(start, *texts, templated=True)


def _refused(where: str, field: str, error: ValueError) -> str:
    return (
        f"{where}, field {field!r}: the tokenizer's chat template refuses it "
        f"({error}); change the field or the template"
    )


def _renders(
    template: ChatTemplate,
    messages: list[dict],
    tools: list[Any] | None,
    options: Mapping[str, bool],
) -> bool:
    """Whether the template takes the messages without the row's own arguments."""
    try:
        template.render(messages, tools, None, **options)
    except ValueError:
        return False
    return True


def said(message: dict) -> str:
    """A message's text, its parts joined, without the white space around it."""
    content = message.get("content", "")
    parts = content if isinstance(content, list) else [{"text": content}]
    return "".join(part["text"] for part in parts).strip()


def _field(row: Mapping[str, Any], field: str, where: str) -> str | list[dict]:
    """A required field: text, or a list of well-formed messages without their Nones."""
    if field not in row:
        raise InputError(
            f"{where}, has no {field!r}, only {', '.join(map(repr, row))}; each row "
            "needs chosen, rejected and (unless both start with it) prompt"
        )
    value = row[field]
    if isinstance(value, str):
        return value
    numbers = isinstance(value, Sequence) and value and isinstance(value[0], int)
    if isinstance(value, bytes | bytearray) or numbers:
        found = "a list of numbers, as token ids are"
        if isinstance(value, bytes | bytearray):
            found = f"bytes ({_short(value)})"
        raise InputError(
            f"{where}, field {field!r}, is {found}; it must be text or a list of "
            "messages: decode it"
        )
    if not isinstance(value, Sequence):
        raise InputError(
            f"{where}, field {field!r}, is {_kind(value)}; it must be text or a list "
            "of messages: correct the row or leave it out"
        )
    if len(value) == 0:
        raise InputError(
            f"{where}, field {field!r}, is an empty list; give at least one message"
        )
    return [_message(m, f"{where}, field {field!r}", i) for i, m in enumerate(value)]


def _message(message: Any, where: str, number: int) -> dict[str, Any]:
    rule = 'a message is {"role": "user" or another, "content": text}'
    if not isinstance(message, Mapping):
        raise InputError(f"{where}, message {number}, is {_kind(message)}; {rule}")
    # Where rows differ, Arrow fills in the keys of the others.
    message = {k: v for k, v in message.items() if v is not None}
    for key, other in (("role", "from"), ("content", "value")):
        if key not in message and not (key == "content" and "tool_calls" in message):
            hint = f": rename {other!r} to {key!r}" if other in message else ""
            raise InputError(f"{where}, message {number}, has no {key!r}; {rule}{hint}")
    if not isinstance(message["role"], str):
        raise InputError(
            f"{where}, message {number}, has the role {_short(message['role'])}; {rule}"
        )
    content = message.get("content", "")
    parts = content if isinstance(content, list) else []
    if not isinstance(content, str | list) or any(
        not isinstance(part, Mapping)
        or part.get("type") != "text"
        or not isinstance(part.get("text"), str)
        for part in parts
    ):
        raise InputError(
            f"{where}, message {number}, has the content {_short(content)}; {rule}, or "
            'a list of {"type": "text", "text": text} (images and sound are not read)'
        )
    return message


def split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt and completions of two texts whose shared start is the prompt.

    A space just before the difference goes to the completions. If one text begins with
    the whole other, the prompt ends before the shorter one's last character.
    """
    shorter = min(len(chosen), len(rejected))
    shared = shared_length(chosen, rejected)
    if shared == shorter:
        shared = max(shorter - 1, 0)
    elif shared > 0 and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _shared_turns(chosen: list[dict], rejected: list[dict], where: str) -> int:
    """How many messages both start with, at least one message of each being left."""
    shared = min(shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if shared == 0:
        raise InputError(
            f"{where}, fields 'chosen' and 'rejected', do not start with the same "
            "messages, which would be the prompt; give the prompt in both, or as a "
            "list of messages in a field 'prompt'"
        )
    return shared


def shared_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many characters, or messages, both start with."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _tools(row: Mapping[str, Any], where: str) -> list[Any] | None:
    """The row's `tools`, which may be a list or that list as JSON."""
    tools = row.get("tools")
    if isinstance(tools, str):
        with library_errors(
            lambda error: (
                f"{where}, field 'tools', is not JSON ({one_line(error)}); give a "
                "list of tools, as JSON or not"
            )
        ):
            tools = json.loads(tools)
    if tools is not None and not isinstance(tools, list):
        raise InputError(
            f"{where}, field 'tools', is {_kind(tools)}; give a list of tools, or null"
        )
    return tools


def _arguments(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    arguments = row.get("chat_template_kwargs")
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise InputError(
            f"{where}, field 'chat_template_kwargs', is {_kind(arguments)}; give a "
            "mapping of the chat template's arguments, or null"
        )
    return {k: v for k, v in arguments.items() if v is not None}


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "a list of messages"
    return f"{_short(value)} (a {type(value).__name__})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
