"""One preference pair as three texts: the prompt, and the prompt with each completion.

The rules are TRL's: `extract_prompt` and `DPOTrainer._prepare_dataset` of trl 1.16.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from engine.data.forms import PairRow
from engine.data.messages import Messages, said
from engine.data.templates import ChatTemplate
from engine.errors import InputError


class Side(NamedTuple):
    """A conversation of which the last messages, from `start` on, are an answer."""

    messages: list[dict[str, Any]]
    start: int
    unscored: frozenset[int]  # numbers of the answer's messages with loss_weight 0
    tools: list[Any] | None
    arguments: Mapping[str, Any]  # of the chat template


class Texts(NamedTuple):
    """The texts to tokenise; the last two begin with the prompt (or nearly so)."""

    prompt: str
    chosen: str
    rejected: str
    # What a chat template has rendered them from, and put every special token into;
    # None: plain text.
    sides: tuple[Side, Side] | None
    # What the template makes otherwise of the prompt when an answer follows.
    rewritten: str | None = None
    tools_unseen: bool = False  # whether there are tools that the template leaves out


def row_texts(
    row: PairRow, where: str, template: ChatTemplate, eos: str | None
) -> Texts:
    """The texts of one pair; plain-text completions end with `eos`, once.

    Raises:
        InputError: kinds that do not go together, messages that the template refuses or
            leaves words of out, or half a character; it begins with `where`.
    """
    chosen, rejected = row.chosen, row.rejected
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise InputError(
            f"{where}, field 'rejected', is {_kind(rejected)}, but chosen is "
            f"{_kind(chosen)}; make both text or both lists of messages"
        )
    if isinstance(chosen, str) and isinstance(rejected, str):
        texts = _plain_texts(row.prompt, chosen, rejected, where, eos)
    else:
        texts = _templated_texts(row, where, template)
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


def _kind(side: str | Messages) -> str:
    return "text" if isinstance(side, str) else "a list of messages"


def _plain_texts(
    prompt: str | Messages | None,
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
    return Texts(prompt, prompt + chosen, prompt + rejected, sides=None)


def _templated_texts(row: PairRow, where: str, template: ChatTemplate) -> Texts:
    sides = _sides(row, where)
    if not template.exists:
        raise InputError(
            f"{where}, holds lists of messages, but the tokenizer has no chat "
            "template; name one that has in model.tokenizer (an instruct model's), "
            "or give prompt, chosen and rejected as text"
        )
    start = sides[0].start
    tools, arguments = row.tools, row.arguments

    def render(field: str, messages: list[dict], **options: bool) -> str:
        try:
            return template.render(messages, tools, arguments, **options)
        except ValueError as error:
            if arguments and _renders(template, messages, tools, options):
                field = "chat_template_kwargs"
            raise InputError(_refused(where, field, error)) from error

    messages = sides[0].messages[:start]
    prompt = render("prompt", messages, add_generation_prompt=True)
    # Templates leave the reasoning of earlier answers out, as they are meant to.
    asked = [i for i, m in enumerate(messages) if m["role"] != "assistant"]

    def render_asked(changed: list[dict]) -> str:
        copy = list(messages)
        for i, message in zip(asked, changed, strict=True):
            copy[i] = message
        return template.render(copy, tools, arguments)

    template.check_words(
        f"{where}, field 'prompt'",
        [messages[i] for i in asked],
        prompt,
        0,
        render_asked,
    )
    texts = []
    for field, side in zip(("chosen", "rejected"), sides, strict=True):
        text = render(field, side.messages)
        template.check_words(
            f"{where}, field {field!r}",
            side.messages[start:],
            text,
            len(prompt) if text.startswith(prompt) else None,
            lambda answer: template.render(messages + answer, tools, arguments),
        )
        texts.append(text)
    rewritten = None
    if not all(text.startswith(prompt) for text in texts):
        # Besides the generation prompt, which an answer may replace.
        before = template.render(messages, tools, arguments)
        rewritten = _first_difference(before, texts)
    unseen = False
    if tools:
        without = template.render(messages, None, arguments, add_generation_prompt=True)
        unseen = without == prompt
    chosen, rejected = texts
    return Texts(prompt, chosen, rejected, sides, rewritten, unseen)


def _sides(row: PairRow, where: str) -> tuple[Side, Side]:
    """Both whole conversations, with the prompt's messages in front."""
    prompt, chosen, rejected = row.prompt, row.chosen, row.rejected
    assert isinstance(chosen, Messages) and isinstance(rejected, Messages)
    if isinstance(prompt, Messages):
        before, start = prompt.messages, len(prompt.messages)
        unscored = [
            frozenset(i + start for i in x.unscored) for x in (chosen, rejected)
        ]
    else:
        before, start = [], _shared_turns(chosen.messages, rejected.messages, where)
        unscored = [
            frozenset(i for i in x.unscored if i >= start) for x in (chosen, rejected)
        ]
        if prompt is not None and prompt.strip() not in map(
            said, chosen.messages[:start]
        ):
            raise InputError(
                f"{where}, field 'prompt', is text that is no message of what chosen "
                "and rejected start with; give messages, or leave the column out"
            )
    one, other = (
        Side(before + side.messages, start, of_it, row.tools, row.arguments)
        for side, of_it in zip((chosen, rejected), unscored, strict=True)
    )
    return one, other


def _first_difference(before: str, texts: Sequence[str]) -> str | None:
    """Where a prompt is not what a text begins with: what stands there in both."""
    for text in texts:
        at = shared_length(before, text)
        if at < len(before):
            return f"{before[at : at + 20]!r} becomes {text[at : at + 20]!r}"
    return None


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
