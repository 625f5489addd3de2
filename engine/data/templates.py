"""A tokenizer's chat template: one date for every run, and no words that get lost."""

import datetime
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from engine.errors import InputError

logger = logging.getLogger(__name__)

# What a template that asks for today is told. Tokens must not depend on the day: the
# training set and the evaluation set, or two machines, would see different prompts.
# It is the date that Llama 3.1's template takes when it is told none.
FIXED_DATE = datetime.datetime(2024, 7, 26)

_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
# What transformers' own call takes: a row that sets it as an argument of its template
# would change how it is called, or what comes back.
TAKEN_ARGUMENTS = frozenset(
    name
    for name, parameter in inspect.signature(
        PreTrainedTokenizerBase.apply_chat_template
    ).parameters.items()
    if parameter.kind != parameter.VAR_KEYWORD and name != "documents"
) | {"messages", "self"}
_REASONING = ("reasoning_content", "reasoning", "thinking")
_PIECES = re.compile(r"<[^<>\s]*>|[^\s<]+|<")
_SHOWN = 60  # characters of a text that an error shows


def _date_macro() -> str:
    """Jinja for a `strftime_now` that formats `FIXED_DATE`, whatever it is asked for.

    A macro in front of the template, since transformers hands no functions to it; its
    argument is called as that of transformers' own function.
    """
    codes = "aAbBcdfHIjmMpSUwWxXyYGuV"
    steps = "|replace('%%', '\0')"
    for code in codes:
        text = FIXED_DATE.strftime(f"%{code}")
        steps += f"|replace('%{code}', '{text}')"
        steps += f"|replace('%-{code}', '{text.lstrip('0') or '0'}')"
    steps += "|replace('\0', '%')"
    # The line break is the block's own; the template starts on a line of its own.
    return (
        f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n"
    )


_DATE_MACRO = _date_macro()


class ChatTemplate:
    """Renders messages as text; `tokenizer` may be one without a chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._walks: dict[str, bool] = {}
        self._headless: dict[str, bool] = {}

    @property
    def exists(self) -> bool:
        """Whether there is a template."""
        return self._tokenizer.chat_template is not None

    def warn_of_date(self):
        """Says which date the template is told, if it asks for one."""
        if self.exists and "strftime_now" in str(self._tokenizer.chat_template):
            logger.warning(
                "the chat template asks for today's date; it is told %s in every run, "
                "so that tokens do not depend on the day; where the template has a "
                "name for the date (date_string), rows may set it in "
                "chat_template_kwargs",
                FIXED_DATE.strftime("%d %b %Y"),
            )

    def render(
        self,
        messages: list[dict],
        tools: list[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The template's text of `messages`.

        Content in parts, all of them text, is joined for a template that does not walk
        over parts: it would write nothing, or Python's notation of a list.

        Raises:
            ValueError: what the template refuses, in one line.
        """
        template, messages = self._prepared(messages, tools)
        return self._apply(template, messages, tools, arguments, add_generation_prompt)

    def source(self, tools: list[Any] | None) -> str:
        """The template itself, of which a tokenizer may have one for tools."""
        return str(self._tokenizer.get_chat_template(tools=tools))

    @property
    def has_no_header(self) -> bool:
        """Whether the template writes nothing in front of what an assistant says."""
        template = self.source(None)
        if template not in self._headless:
            asked = [{"role": "user", "content": "qxab"}]
            answer = {"role": "assistant", "content": "qxcd"}
            try:
                before, whole = self.render(asked), self.render([*asked, answer])
            except ValueError:
                before, whole = "", ""
            words = whole[len(before) :].lstrip()
            headless = whole.startswith(before) and words.startswith("qxcd")
            self._headless[template] = headless
        return self._headless[template]

    def marked(
        self,
        messages: list[dict],
        tools: list[Any] | None,
        arguments: Mapping[str, Any],
    ) -> tuple[list[int], list[int]]:
        """Tokens of `messages`, and 1 for each that {% generation %} marks."""
        template, messages = self._prepared(messages, tools)
        found: Any = self._tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tools=tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **arguments,
        )
        return found["input_ids"], found["assistant_masks"]

    def _prepared(
        self, messages: list[dict], tools: list[Any] | None
    ) -> tuple[str, list[dict]]:
        """The template with its date, and the messages as it takes them."""
        template = self.source(tools)
        if "strftime_now" in template:
            template = _DATE_MACRO + template
        if any(isinstance(m.get("content"), list) for m in messages):
            if not self._walks_over_parts(template):
                messages = [_joined(message) for message in messages]
        return template, messages

    def _apply(
        self,
        template: str,
        messages: list[dict],
        tools: list[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(arguments or {}),
            )
        except _TEMPLATE_ERRORS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(reason) from error
        assert isinstance(text, str)
        return text

    def _walks_over_parts(self, template: str) -> bool:
        """Whether the template writes the texts of all parts, and nothing else of them.

        Seen by rendering a conversation once in parts and once as text.
        """
        if template not in self._walks:
            words = (("qxab", "qxcd"), ("qxef", "qxgh"))
            roles = ("user", "assistant")
            parts, plain = [], []
            for role, texts in zip(roles, words, strict=True):
                content = [{"type": "text", "text": text} for text in texts]
                parts.append({"role": role, "content": content})
                plain.append({"role": role, "content": "".join(texts)})
            try:
                shown = self._apply(template, parts)
            except ValueError:
                shown = ""
            try:
                usual = self._apply(template, plain).count("type")
            except ValueError:
                usual = 0  # a template for parts alone
            complete = all(word in shown for texts in words for word in texts)
            self._walks[template] = complete and shown.count("type") <= usual
        return self._walks[template]

    def check_words(
        self,
        where: str,
        messages: list[dict],
        text: str,
        start: int | None,
        render: Callable[[list[dict]], str],
    ):
        """Refuses messages of which the template leaves words out.

        Args:
            text: what the template made of them, from `start` on; None: nobody knows
                where in the text they begin, so that words may be those of others.
            render: the text with other messages in their place.
        Raises:
            InputError: beginning with `where`, naming the first words that are missing.
        """
        place, suspects = start or 0, []
        for number, message in enumerate(messages):
            for words in _texts(message):
                found = -1 if start is None else text.find(words, place)
                if words and found < 0:
                    suspects.append(number)
                place = max(place, found + len(words))
            if message.get("tool_calls") or message.get("function_call"):
                suspects.append(number)  # in whichever notation the template has
        if not suspects:
            return
        # A template may write words otherwise, with quotes escaped. So a mark is put
        # behind each word, and what is missing is a word whose mark is.
        marks = _Marks()
        marked = [
            marks.put(message) if number in suspects else message
            for number, message in enumerate(messages)
        ]
        try:
            shown = render(marked)
        except ValueError:
            return  # it refuses the marks: nothing can be said
        folded = shown.casefold()
        for mark, words in marks.words.items():
            if mark in shown:
                continue
            words = words if len(words) <= _SHOWN else f"{words[:_SHOWN]}..."
            if mark.casefold() in folded:
                raise InputError(
                    f"{where}: the tokenizer's chat template changes the case of "
                    f"letters in {words!r}, so that the model would see other words "
                    "than are written; change the template"
                )
            raise InputError(
                f"{where}: the tokenizer's chat template leaves {words!r} out, so "
                "that the model would never see it; change the messages (reasoning "
                "and earlier turns may belong elsewhere) or the template"
            )


def _joined(message: dict) -> dict:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return message | {"content": "".join(str(part["text"]) for part in content)}


def _texts(message: dict) -> Iterator[str]:
    """What a message says, without the white space around it, which templates trim."""
    for key in _REASONING:
        if isinstance(message.get(key), str):
            yield message[key].strip()
    content = message.get("content", "")
    for part in content if isinstance(content, list) else [{"text": content}]:
        yield part["text"].strip()


class _Marks:
    """Puts a mark behind each word of messages; `words` has the word of each mark."""

    def __init__(self):
        self.words: dict[str, str] = {}

    def put(self, message: dict) -> dict:
        """The message with all that it says marked."""
        told = (*_REASONING, "content", "tool_calls", "function_call")
        return {k: self._any(v) if k in told else v for k, v in message.items()}

    def _any(self, value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            kept = ("type", "id")
            return {k: v if k in kept else self._any(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [self._any(v, key) for v in value]
        if not isinstance(value, str):
            return value
        if key == "arguments":  # of a tool's call, often an object as JSON
            try:
                return json.dumps(self._any(json.loads(value)))
            except ValueError:
                pass
        return _PIECES.sub(lambda found: found[0] + self._new(found[0]), value)

    def _new(self, word: str) -> str:
        mark = f"qX{len(self.words)}Xq"  # in letters of both cases, to see it change
        self.words[mark] = word
        return mark
