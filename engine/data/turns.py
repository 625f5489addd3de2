"""Which tokens of an answer are scored, where that is less than all of it.

A message's place is found by rendering the conversation up to it and comparing: what
the whole text begins with is where the message begins, or ends. A template may write
earlier turns otherwise than a last one (leave out what a model thought); then the
message's own words, and what the template writes behind them, must stand where they
are looked for. Where that does not settle it the row is refused.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from engine.data.conversations import Side, shared_length
from engine.data.messages import said
from engine.data.pair_tokens import Score
from engine.data.templates import ChatTemplate
from engine.errors import InputError, shortened

Mask = Bool[np.ndarray, " tokens"]
Encode = Callable[[list[str]], list[list[int]]]  # without special tokens of its own
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class _Span(NamedTuple):
    """From a character of the text up to another."""

    start: int
    end: int


class Turns:
    """Finds what is scored of an answer.

    Args:
        encode: the tokenizer of what a template has rendered.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, encode: Encode, score: Score
    ):
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self._encode = encode
        self._score: Score = score
        special: list[str] = tokenizer.all_special_tokens
        self._special = tuple({*special, *_added(tokenizer)})

    def mask(
        self, side: Side, text: str, ids: Sequence[int], where: str
    ) -> Mask | None:
        """Whether each token may be scored, the prompt's too; None: each one may.

        Args:
            text: the whole conversation, rendered; `ids` are its tokens.
            where: the row and the field.
        Raises:
            InputError: an answer without an assistant's turn, or a place that cannot be
                told from what the template writes.
        """
        if self._score == "completion" and not side.unscored:
            return None
        place = _Rendered(self._template, side, text, where, self._special)
        if self._score == "completion":
            scored = np.ones(len(ids), np.bool_)
            for span in map(place.message, sorted(side.unscored)):
                scored[self._tokens(span, text, ids, where)] = False
            return scored
        numbers = [
            i
            for i in range(side.start, len(side.messages))
            if side.messages[i]["role"] == "assistant"
        ]
        if not numbers:
            raise InputError(
                f"{where}, has no message of the role assistant, so that with score: "
                f"{self._score} nothing of it is scored; give one, or use completion"
            )
        if self._score == "last_turn":
            del numbers[:-1]
        wanted = [i for i in numbers if i not in side.unscored]
        scored = np.zeros(len(ids), np.bool_)
        if _GENERATION.search(self._template.source(side.tools)):
            spans = self._marked(side, ids, where)
            for i in wanted:
                # Some templates mark the header, too.
                header = self._first(place.end_of_header(i), text, ids)
                scored[max(spans[i].start, header) : spans[i].stop] = True
            return scored
        for i in wanted:
            span = place.turn(i)
            ended = text[span.start : span.end].rstrip()
            # What a template writes behind the token that ends a turn is no part of it.
            if ended.endswith(self._special):
                span = _Span(span.start, span.start + len(ended))
            scored[self._tokens(span, text, ids, where)] = True
        return scored

    def _tokens(self, span: _Span, text: str, ids: Sequence[int], where: str) -> slice:
        """The tokens of a span; one that reaches into its beginning is one of them."""
        (whole,) = self._encode([text[: span.end]])
        if list(ids[: len(whole)]) != whole:
            found = shortened(text[max(span.end - 10, 0) : span.end + 10])
            raise InputError(
                f"{where}: where a message ends, at {found!r}, a token reaches over "
                "its end, so that it cannot be scored alone; use score: completion "
                "without loss_weight, or a template that ends turns with special tokens"
            )
        return slice(self._first(span.start, text, ids), len(whole))

    def _first(self, at: int, text: str, ids: Sequence[int]) -> int:
        """The first token that is not whole before a character."""
        (before,) = self._encode([text[:at]])
        start = shared_length(before, ids)
        if start < len(before):  # its last tokens depend on what comes behind them
            start = max(start, self._first_within(at, text))
        return start

    def _first_within(self, at: int, text: str) -> int:
        """The first token that ends behind a character, where a tokenizer tells."""
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast):
            return 0
        found = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ends = [end for _, end in found["offset_mapping"]]
        return next((i for i, end in enumerate(ends) if end > at), 0)

    def _marked(self, side: Side, ids: Sequence[int], where: str) -> dict[int, slice]:
        """The tokens of each of the assistant's messages, which the template marks."""
        found, marks = self._template.marked(side.messages, side.tools, side.arguments)
        edges = np.flatnonzero(np.diff([0, *marks, 0]))
        runs = [slice(*map(int, edge)) for edge in edges.reshape(-1, 2)]
        turns = [i for i, m in enumerate(side.messages) if m["role"] == "assistant"]
        if list(found) != list(ids) or len(runs) != len(turns):
            raise InputError(
                f"{where}: the tokenizer's chat template marks {len(runs)} texts "
                f"({{% generation %}}) in a conversation with {len(turns)} messages of "
                "the assistant; correct the template, or use score: completion"
            )
        return dict(zip(turns, runs, strict=True))


def _added(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens that are found in a text before it is split: special ones are such."""
    return list(map(str, tokenizer.added_tokens_decoder.values()))


def _without_last(ending: str, special: tuple[str, ...]) -> str:
    """The end of a turn without the token behind it that ends a whole conversation."""
    for token in special:
        rest = ending.removesuffix(token)
        if rest != ending and rest.rstrip().endswith(special):
            return rest
    return ""


class _Rendered:
    """Where a conversation's messages stand in its text."""

    def __init__(
        self,
        template: ChatTemplate,
        side: Side,
        text: str,
        where: str,
        special: tuple[str, ...],
    ):
        self._template = template
        self._special = special
        self._side = side
        self._text = text
        self._where = where

    def _up_to(self, number: int, generation: bool = False) -> str:
        """The text of the messages before a number."""
        side = self._side
        if number == len(side.messages) and not generation:
            return self._text
        try:
            return self._template.render(
                side.messages[:number], side.tools, side.arguments, generation
            )
        except ValueError as error:
            raise self._unknown(
                number, f"refuses what comes before ({error})"
            ) from None

    def message(self, number: int) -> _Span:
        """A message with all that the template writes around it."""
        return _Span(self._begin(number), self._begin(number + 1))

    def _begin(self, number: int) -> int:
        before = self._up_to(number)
        if self._text.startswith(before):
            return len(before)
        if self._side.messages[number - 1]["role"] == "assistant":
            end = self.turn(number - 1).end
            rest = self._text[end:]
            return end + len(rest) - len(rest.lstrip())
        raise self._rewrites(number, before)

    def turn(self, number: int) -> _Span:
        """An assistant's message, without its header, with its end."""
        text = self._text
        before, asked = self._up_to(number), self._up_to(number, generation=True)
        words = said(self._side.messages[number])
        if text.startswith(asked):
            start = len(asked)
            if asked == before and not self._template.has_no_header:
                raise self._unknown(number, "has no generation prompt to compare with")
        else:
            start = shared_length(text, asked)
            # An answer replaces the rest of the generation prompt, with its own words.
            if not text.startswith(before) or start <= len(before):
                raise self._rewrites(number, before)
            if not words or not text.startswith(words, start):
                raise self._unknown(number, "writes it after another prompt")
        whole = self._up_to(number + 1)
        if text.startswith(whole):
            return _Span(start, len(whole))
        if words and text.startswith(words, start) and words in whole:
            end = start + len(words)
            ending = whole[whole.rfind(words) + len(words) :]
            closed = _without_last(ending, self._special)  # as the last of all
            for written in (ending, closed):
                if written.strip() and text.startswith(written, end):
                    return _Span(start, end + len(written))
        raise self._rewrites(number + 1, whole)

    def end_of_header(self, number: int) -> int:
        """Where what an assistant says begins at the earliest; 0: nothing tells."""
        asked = self._up_to(number, generation=True)
        return len(asked) if self._text.startswith(asked) else 0

    def _rewrites(self, number: int, before: str) -> InputError:
        at = shared_length(before, self._text)
        one, other = before[at : at + 20], self._text[at : at + 20]
        return self._unknown(
            number, f"writes earlier messages otherwise ({one!r} becomes {other!r})"
        )

    def _unknown(self, number: int, why: str) -> InputError:
        return InputError(
            f"{self._where}: where message {number} of the conversation (counting from "
            f"0) begins cannot be told, as the tokenizer's chat template {why}; use "
            "score: completion without loss_weight, or another template"
        )
