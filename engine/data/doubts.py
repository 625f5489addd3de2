"""Data that can be trained on, but is surely not meant: one warning of each kind."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from engine.data.conversations import Texts, shared_length, split_text
from engine.data.forms import PairRow
from engine.data.messages import Messages, said
from engine.data.pair_tokens import Doubt, PairTokens
from engine.data.rows import Origins, PreferenceRows
from engine.errors import InputError, shortened

logger = logging.getLogger(__name__)

# The start of a list of messages as JSON, or as Python writes it.
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
_LEAST_PROMPT = (
    3  # characters: of a shorter one it may be chance that answers repeat it
)
MEANINGS = {
    "messages as text": (
        "hold messages as text in a cell (JSON), which is trained on as it stands, "
        "without the chat template; give lists of messages, in JSON or Parquet files"
    ),
    "prompt repeated": (
        "repeat the prompt at the start of chosen and rejected, so that the model sees "
        "it twice; leave it out of both, or leave the field prompt out"
    ),
    "equal sides": (
        "have the same tokens in chosen and rejected (of what the limits of length "
        "leave), so that nothing is learned from them; remove them, or raise max_length"
    ),
    "no prompt": (
        "have no prompt: the field is not there, and chosen and rejected do not start "
        "with the same text, so that answers are trained on without what was asked; "
        "give each row a prompt"
    ),
    "empty answer": (
        "have an answer without text in chosen or rejected, so that at most the end "
        "of a text is learned from it; fill it in, or remove these rows"
    ),
    "history rewritten": (
        "have messages before the answer that the chat template writes otherwise once "
        "an answer follows (some leave out what a model thought in earlier turns), so "
        "that what is scored begins there, within the prompt; use a template that "
        "leaves earlier messages as they are. The first: "
    ),
    "tools unseen": (
        "have tools that the chat template writes nothing of, so that the model never "
        "sees them; use a template that knows tools, or leave them out"
    ),
    "not the assistant's": (
        "have an answer that does not start with a message of the role assistant, so "
        "that another's words are trained on; correct the roles, or put what comes "
        "before the answer into prompt"
    ),
}


class Doubts:
    """Counts what is seen while rows are tokenised."""

    def __init__(self):
        # The number of rows, the first and the last: rows are seen in order.
        self._rows: dict[str, tuple[int, int, int]] = {}
        self._examples: dict[str, str] = {}  # of the first one

    def _add(self, kind: str, row: int):
        number, first, last = self._rows.get(kind, (0, row, -1))
        self._rows[kind] = (number + (row != last), first, row)

    def see_texts(self, index: int, texts: Texts):
        """Looks at what the chat template has made of a row."""
        if texts.rewritten is not None:
            self._examples.setdefault("history rewritten", texts.rewritten)
            self._add("history rewritten", index)
        if texts.tools_unseen:
            self._add("tools unseen", index)

    def see_row(self, index: int, row: PairRow):
        """Looks at the fields of a row that is well formed."""
        prompt, *sides = map(_written, (row.prompt, row.chosen, row.rejected))
        texts = [side for side in (prompt, *sides) if isinstance(side, str)]
        if any(_MESSAGES.match(text) for text in texts):
            self._add("messages as text", index)
        if prompt is not None and all(_begins_with(side, prompt) for side in sides):
            self._add("prompt repeated", index)
        elif not all(map(_is_assistants, _answers(prompt, *sides))):
            self._add("not the assistant's", index)
        if any(map(_is_empty, sides)):
            self._add("empty answer", index)
        elif prompt is None and len(texts) == 2 and not split_text(*texts)[0].strip():
            self._add("no prompt", index)

    def see_pairs(self, pairs: PairTokens):
        """Looks at the tokens of some pairs."""
        for p in _equal_sides(pairs):
            self._add("equal sides", int(pairs.rows[p]))

    def found(self) -> tuple[Doubt, ...]:
        """One of each kind that was seen."""
        return tuple(
            Doubt(kind, number, first, self._examples.get(kind, ""))
            for kind, (number, first, _) in self._rows.items()
        )


def report(doubts: tuple[Doubt, ...], rows: PreferenceRows):
    """Logs one warning of each kind."""
    for doubt in doubts:
        ignored = rows.sources[int(rows.source_ids[doubt.first])].ignored
        warn(doubt, f"{len(rows)} rows", rows, ignored)


def check_answers_differ(name: str, pairs: PairTokens):
    """Refuses a data set of which nothing can be learned.

    Raises:
        InputError: naming the data set.
    """
    if any(doubt.kind == "equal sides" for doubt in pairs.doubts):
        if len(list(_equal_sides(pairs))) == len(pairs):
            raise InputError(
                f"{name}: all of its {len(pairs)} pairs have the same tokens in chosen "
                "and rejected (of what the limits of length leave), so that nothing "
                "can be learned; give two different answers, or raise max_length"
            )


def warn(doubt: Doubt, of: str, rows: Origins, ignored: Sequence[str]):
    """Logs it.

    Args:
        of: among how many rows it was seen.
        ignored: the columns of the first row's source that are not read.
    """
    unread = ""
    if doubt.kind == "no prompt" and ignored:
        unread = f" (not read: {shortened(', '.join(ignored))})"
    logger.warning(
        "%d of %s (the first: %s) %s",
        doubt.num_rows,
        of,
        rows.where(doubt.first),
        MEANINGS[doubt.kind] + unread + doubt.example,
    )


def warn_beyond_positions(pairs: PairTokens, max_length: int | None, positions: int):
    """Logs a warning where sequences may be longer than a model knows positions.

    Args:
        positions: the model's `max_position_embeddings`.
    """
    if max_length is not None and max_length <= positions:
        return
    beyond = np.flatnonzero(pairs.lengths.reshape(-1, 2).max(axis=1) > positions)
    found = f"none of {len(pairs)} pairs is so long"
    if len(beyond):
        found = (
            f"{len(beyond)} of {len(pairs)} pairs are longer, the first of them row "
            f"{pairs.rows[beyond[0]]} (counting from 0)"
        )
    logger.warning(
        "max_length=%s is above the %d positions of the model "
        "(max_position_embeddings): %s; lower max_length",
        max_length,
        positions,
        found,
    )


def _equal_sides(pairs: PairTokens) -> Iterator[int]:
    """The numbers of the pairs whose answers have the same tokens."""
    start, end = pairs.offsets[:-1].reshape(-1, 2), pairs.offsets[1:].reshape(-1, 2)
    length = end - start
    for p in np.flatnonzero(length[:, 0] == length[:, 1]).tolist():
        chosen, rejected = (
            pairs.tokens[a:b] for a, b in zip(start[p], end[p], strict=True)
        )
        if np.array_equal(chosen, rejected):
            yield p


def _written(side: str | Messages | None) -> Any:
    """Text, or a plain list of messages."""
    return side.messages if isinstance(side, Messages) else side


def _answers(prompt: Any, chosen: Any, rejected: Any) -> list[list[Mapping[str, Any]]]:
    """The messages of each side that are its answer; none of a side that is text."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        return []
    assert chosen and rejected
    start = 0
    if prompt is None or isinstance(prompt, str):
        start = shared_length(chosen, rejected)
        start = min(start, len(chosen) - 1, len(rejected) - 1)
    return [chosen[start:], rejected[start:]]


def _is_assistants(answer: list[Mapping[str, Any]]) -> bool:
    return answer[0]["role"] == "assistant"


def _is_empty(side: Any) -> bool:
    if isinstance(side, str):
        return not side.strip()
    # Besides its text, a message may call tools or hold reasoning.
    last = {key: value for key, value in side[-1].items() if value}
    return last.keys() <= {"role", "content", "name"} and not said(last)


def _begins_with(side: Any, prompt: Any) -> bool:
    if isinstance(prompt, str) and isinstance(side, str):
        start = prompt.strip()
        return len(start) >= _LEAST_PROMPT and side.lstrip().startswith(start)
    if isinstance(prompt, str) or isinstance(side, str):
        return False
    start = list(map(_gist, prompt))
    return list(map(_gist, side[: len(start)])) == start


def _gist(message: Mapping[str, Any]) -> tuple[Any, Any]:
    return message.get("role"), message.get("content")
