"""Where tokens begin and end otherwise than the model needs to learn from them."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool
from transformers import PreTrainedTokenizerBase

from engine.data.forms import PairRow, read_pairs
from engine.data.messages import Messages
from engine.data.pair_tokens import PairTokens
from engine.data.rows import PreferenceRows
from engine.data.templates import ChatTemplate
from engine.inspection.summary import cuts
from engine.models.checkpoint import CONFIG, read_json
from engine.models.save_directory import GENERATION

Form = Literal["messages", "text", "ids"]  # of a data set's rows

_LAST = 4  # tokens at the end of an answer, where its end must be marked


class Findings(NamedTuple):
    """What should be looked at, and what only looks as if it should."""

    warnings: list[str]
    notes: list[str]


def stop_ids(tokenizer: PreTrainedTokenizerBase, directory: Path) -> frozenset[int]:
    """Ids that end generation: EOS, and what the model's files have as such."""
    found: list[Any] = [tokenizer.eos_token_id]
    for name in (CONFIG, GENERATION):
        if (directory / name).is_file():
            ids = read_json(directory / name).get("eos_token_id")
            found += ids if isinstance(ids, list) else [ids]
    return frozenset(x for x in found if isinstance(x, int))


def form_of(rows: PreferenceRows) -> Form:
    """The form of the first row."""
    _, (row,) = next(rows.batches(1))
    pair = read_pairs(row, rows.where(0))[0]
    if not isinstance(pair, PairRow):
        return "ids"
    return "messages" if isinstance(pair.chosen, Messages) else "text"


def check_tokens(
    tokenizer: PreTrainedTokenizerBase,
    rows: PreferenceRows,
    pairs: PairTokens,
    stops: Collection[int],
    form: Form,
) -> Findings:
    """Warnings of BOS, of ends that are not marked, of a template without a header.

    Args:
        stops: ids at which the model's generation ends.
        form: of the rows; messages have gone through the chat template.
    """
    warnings, notes = [], []
    checks = _Checks(tokenizer, rows, pairs)
    warnings += checks.bos()
    warnings += checks.end(stops)
    warnings += checks.unknown()
    template = ChatTemplate(tokenizer)
    if form != "messages":
        warnings += checks.end_inside()
        if form == "text" and template.exists:
            warnings.append(
                "the rows are plain text, so that the tokenizer's chat template is not "
                "used; a model that is talked to through it needs rows of messages"
            )
    elif not _has_header(template):
        warnings.append(
            "the chat template writes nothing for add_generation_prompt: the prompt "
            "ends before the assistant's header, which is trained on with the answer; "
            "correct the template"
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id in stops:
        notes.append(
            f"pad_token {tokenizer.pad_token!r} also ends a text; this does no harm "
            "here: padding is known by its place, and the end of a text is scored"
        )
    return Findings(warnings, notes)


class _Checks:
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: PreferenceRows,
        pairs: PairTokens,
    ):
        self._tokenizer = tokenizer
        self._rows = rows
        self._pairs = pairs
        self._start, self._stop = pairs.offsets[:-1], pairs.offsets[1:]
        self._front, self._behind = np.moveaxis(cuts(pairs).reshape(-1, 2), 1, 0)

    def _said(self, sequences: Bool[np.ndarray, " sequences"], what: str) -> list[str]:
        """One warning, of the pairs that have such a sequence."""
        found = np.flatnonzero(sequences.reshape(-1, 2).any(axis=1))
        if len(found) == 0:
            return []
        where = self._rows.where(int(self._pairs.rows[found[0]]))
        return [f"{len(found)} of {len(self._pairs)} pairs (the first: {where}) {what}"]

    def bos(self) -> list[str]:
        """BOS twice, or not where the tokenizer writes it before every text."""
        bos, token = self._tokenizer.bos_token_id, self._tokenizer.bos_token
        if bos is None:
            return []
        tokens = self._pairs.tokens
        begins = tokens[self._start] == bos
        twice = begins & (tokens[self._start + 1] == bos)
        said = self._said(
            twice, f"begin with {token!r} twice; leave it out of the data or template"
        )
        usual = self._tokenizer("a", verbose=False)["input_ids"]
        if isinstance(usual, list) and usual[:1] == [bos]:
            said += self._said(
                ~begins & (self._front == 0),
                f"do not begin with {token!r}, which this tokenizer writes before "
                "every text; the template should write it",
            )
            said += self._said(
                ~begins & (self._front > 0),
                f"have lost {token!r} at their start to max_length (keep_end); set "
                "max_prompt_length, which keeps it",
            )
        return said

    def end(self, stops: Collection[int]) -> list[str]:
        """Answers that are whole and end without a scored token that ends a text."""
        marked = np.zeros(len(self._start), np.bool_)
        for step in range(1, _LAST + 1):
            at = np.maximum(self._stop - step, self._start)
            is_end = np.isin(self._pairs.tokens[at], list(stops))
            marked |= is_end & self._pairs.scored[at]
        missing = ~marked & (self._behind == 0)
        names = ", ".join(
            f"{self._tokenizer.convert_ids_to_tokens(x)!r}" for x in sorted(stops)
        )
        return self._said(
            missing,
            "have an answer that is not cut and whose end is not marked by a scored "
            f"token that ends generation ({names or 'there is none'}), so that the "
            "model does not learn to stop; correct the template, eos_token or "
            "generation_config.json",
        )

    def unknown(self) -> list[str]:
        """Tokens that stand for what the vocabulary does not have."""
        unknown = self._tokenizer.unk_token_id
        if unknown is None:
            return []
        owner = np.searchsorted(
            self._stop, np.flatnonzero(self._pairs.tokens == unknown), side="right"
        )
        has = np.zeros(len(self._start), np.bool_)
        has[owner] = True
        return self._said(
            has,
            f"hold {self._tokenizer.unk_token!r}, which stands for text that the "
            "vocabulary does not have; is it the model's own tokenizer?",
        )

    def end_inside(self) -> list[str]:
        """Plain text in which an answer ends before its end."""
        eos = self._tokenizer.eos_token_id
        scored = self._pairs.scored & (self._pairs.tokens == eos)
        owner = np.searchsorted(self._stop, np.flatnonzero(scored), side="right")
        count = np.bincount(owner, minlength=len(self._start))
        ends = self._pairs.tokens[self._stop - 1] == eos
        return self._said(
            count > ends,
            f"have {self._tokenizer.eos_token!r} inside an answer, where the model "
            "learns to stop; remove it from the text",
        )


def _has_header(template: ChatTemplate) -> bool:
    """Whether the template can begin an answer; true of one that refuses the probe."""
    messages = [{"role": "user", "content": "x"}]
    try:
        asked = template.render(messages, add_generation_prompt=True)
        return asked != template.render(messages)
    except ValueError:
        return True
