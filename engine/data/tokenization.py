"""Token ids of preference pairs, and which of them are scored.

Ids and boundaries are those of `DPOTrainer` in trl 1.16, which tokenises prompt and
prompt + completion each as a whole, so that tokens may merge across the boundary.
"""

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64
from transformers import PreTrainedTokenizerBase

from engine.data.conversations import Texts, row_texts
from engine.data.doubts import Doubts
from engine.data.pair_tokens import Limits, PairTokens
from engine.data.rows import PreferenceRows
from engine.data.stages import tokenising
from engine.data.templates import ChatTemplate
from engine.errors import InputError

logger = logging.getLogger(__name__)

_CHUNK = 1000  # rows tokenised at a time


class Ragged(NamedTuple):
    """Rows of different lengths: row i is values[offsets[i]:offsets[i + 1]]."""

    values: Int32[np.ndarray, " values"]
    offsets: Int64[np.ndarray, " bounds"]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "Ragged":
        """The rows of a list of lists."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = chain.from_iterable(rows)
        return cls(np.fromiter(flat, np.int32, count=int(offsets[-1])), offsets)


def encode_pairs(
    rows: PreferenceRows, tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> PairTokens:
    """Tokenises every row once, and leaves out pairs with nothing to score.

    Raises:
        InputError: a row that is not a preference pair, naming it; or no pair is left.
    """
    encode = _Encoder(tokenizer)
    template, doubts = ChatTemplate(tokenizer), Doubts()
    parts: list[PairTokens] = []
    unstable = 0
    for first, batch in rows.batches(_CHUNK):
        texts = [
            row_texts(row, rows.where(first + i), template, encode.eos_text)
            for i, row in enumerate(batch)
        ]
        for i, row in enumerate(batch):
            doubts.see_row(first + i, row)
        where = f"{rows.where(first)}, and the {len(texts) - 1} rows after it"
        prompts, pairs = encode(texts, where)
        boundary = _boundaries(prompts, pairs)
        unstable += int((boundary < np.diff(prompts.offsets)).sum())
        parts.append(_cut(pairs, boundary, encode.bos, limits, first))
        doubts.see_pairs(parts[-1])
    if unstable:
        logger.info(
            "in %d of %d rows the prompt's tokens change when a completion follows "
            "(merged tokens, or the chat template); scoring starts where they differ",
            unstable,
            len(rows),
        )
    sizes = np.concatenate([part.lengths for part in parts])
    result = PairTokens(
        tokens=np.concatenate([part.tokens for part in parts]),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]),
        scored=np.concatenate([part.scored for part in parts]),
        completion_start=np.concatenate([part.completion_start for part in parts]),
        rows=np.concatenate([part.rows for part in parts]),
        weights=np.concatenate([part.weights for part in parts]),
        dropped=sum(part.dropped for part in parts),
        doubts=doubts.found(),
        limits=limits,
    )
    if len(result) == 0:
        raise InputError(
            f"none of the {len(rows)} pairs has a token to score left within "
            f"max_length={limits.max_length} ({limits.truncation_mode}); raise "
            "max_length, set max_prompt_length below it, or use keep_end"
        )
    return result


class _Encoder:
    """A tokenizer that writes BOS at most once, and EOS after plain text once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self.bos, self._bos_text = _special(tokenizer.bos_token_id, tokenizer.bos_token)
        self._eos, eos_text = _special(tokenizer.eos_token_id, tokenizer.eos_token)
        bare, whole = self._ids(["a"], False)[0], self._ids(["a"], True)[0]
        grown = len(whole) > len(bare)
        self._adds_bos = grown and whole[:1] == [self.bos] != bare[:1]
        self._adds_eos = grown and whole[-1:] == [self._eos] != bare[-1:]
        # What marks the end of a text; "" where special tokens in a text are not
        # recognised (split_special_tokens), so that the id is appended instead.
        self.eos_text: str | None = None
        if eos_text is not None:
            known = self._ids([eos_text], False)[0] == [self._eos]
            self.eos_text = eos_text if known else ""

    def __call__(self, texts: list[Texts], where: str) -> tuple[Ragged, Ragged]:
        """Tokens of the prompts [n], and of chosen0, rejected0, chosen1, ... [2n]."""
        prompts: list[list[int]] = [[]] * len(texts)
        pairs: list[list[int]] = [[]] * (2 * len(texts))
        for templated in (False, True):
            places = [i for i, t in enumerate(texts) if t.templated is templated]
            if not places:
                continue
            flat = [t for i in places for t in texts[i][:3]]
            ids = self._ids(flat, not templated, where)
            if not templated:
                self._mend(flat, ids)
            for k, i in enumerate(places):
                prompts[i], pairs[2 * i], pairs[2 * i + 1] = ids[3 * k : 3 * k + 3]
        return Ragged.of(prompts), Ragged.of(pairs)

    def _ids(
        self, texts: list[str], add_special_tokens: bool, where: str = "one letter"
    ) -> list[list[int]]:
        with tokenising(where):
            encoded = self._tokenizer(
                texts,
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # lengths above the model's are cut later, or meant
            )
        return encoded["input_ids"]  # pyright: ignore[reportReturnType]

    def _mend(self, texts: list[str], ids: list[list[int]]):
        """One BOS, one EOS; both lists go prompt, chosen, rejected, prompt, ..."""
        for k, (text, row) in enumerate(zip(texts, ids, strict=True)):
            if self._adds_eos:
                row.pop()
            if self._adds_bos and self._bos_text and row[1:2] == [self.bos]:
                # With EOS as BOS, an empty text and its EOS look the same in ids.
                start = texts[k - k % 3] or text[: len(text) - len(self.eos_text or "")]
                if start.lstrip().startswith(self._bos_text):
                    del row[0]
            if k % 3 and self._eos is not None and row[-1:] != [self._eos]:
                row.append(self._eos)


def _special(token_id: Any, text: Any) -> tuple[int | None, str | None]:
    """Id and text of a special token; both None where the tokenizer has none."""
    if not isinstance(token_id, int) or not isinstance(text, str):
        return None, None
    return token_id, text


def _boundaries(prompts: Ragged, pairs: Ragged) -> Int64[np.ndarray, " pairs"]:
    """Tokens at the start of each prompt that both its sequences begin with."""
    size = np.diff(prompts.offsets)
    boundary = size.copy()
    for side in (0, 1):
        start, end = pairs.offsets[side:-1:2], pairs.offsets[side + 1 :: 2]
        count = np.minimum(size, end - start)
        of_prompt = prompts.values[ragged_arange(prompts.offsets[:-1], count)]
        differs = np.flatnonzero(of_prompt != pairs.values[ragged_arange(start, count)])
        shared = count.copy()
        # The first difference in each row: positions ascend, and so do the rows.
        row, first = np.unique(
            np.repeat(np.arange(len(count)), count)[differs], return_index=True
        )
        shared[row] = differs[first] - (np.cumsum(count) - count)[row]
        boundary = np.minimum(boundary, shared)
    return boundary


def _cut(
    pairs: Ragged,
    boundary: Int64[np.ndarray, " pairs"],
    bos: int | None,
    limits: Limits,
    first_row: int,
) -> PairTokens:
    """Applies the limits, and drops pairs of which a side has nothing left to score."""
    start, end = pairs.offsets[:-1].copy(), pairs.offsets[1:].copy()
    # A limit beyond all tokens means none; sums with it must not leave int64.
    beyond = len(pairs.values) + 1
    limits = limits.at_most(beyond)
    origin = start.copy()
    score_at = start + np.repeat(boundary, 2)
    keeps_bos = np.zeros(len(start), np.bool_)
    if limits.max_prompt_length is not None:
        cut = np.maximum(score_at - limits.max_prompt_length, start)
        # Models that begin every text with BOS are lost without it.
        keeps_bos = (cut > start) & _begins_with(pairs, bos)
        start = cut
    if limits.max_completion_length is not None:
        end = np.minimum(end, score_at + limits.max_completion_length)
    if limits.max_length is not None:
        if limits.truncation_mode == "keep_start":
            end = np.minimum(end, start + limits.max_length)
        else:
            cut = np.maximum(start, end - limits.max_length)
            keeps_bos &= cut == start
            start = cut
    # Nothing predicts a sequence's first token, so it is never scored.
    score_at = np.maximum(score_at, start + 1)
    kept = np.flatnonzero((end > score_at).reshape(-1, 2).all(axis=1))
    sequences = (2 * kept[:, None] + np.arange(2)).ravel()
    size = (end - start)[sequences]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(size)])
    source = ragged_arange(start[sequences], size)
    scored = source >= np.repeat(score_at[sequences], size)
    with_bos = np.flatnonzero(keeps_bos[sequences])
    source[offsets[with_bos]] = origin[sequences[with_bos]]
    return PairTokens(
        tokens=pairs.values[source],
        scored=scored,
        offsets=offsets,
        completion_start=(score_at - start)[sequences].astype(np.int32),
        rows=first_row + kept,
        weights=np.ones(len(kept), np.float32),
        dropped=len(boundary) - len(kept),
    )


def _begins_with(pairs: Ragged, bos: int | None) -> Bool[np.ndarray, " sequences"]:
    begins = np.zeros(len(pairs.offsets) - 1, np.bool_)
    filled = np.diff(pairs.offsets) > 0
    if bos is not None:
        begins[filled] = pairs.values[pairs.offsets[:-1][filled]] == bos
    return begins


def ragged_arange(
    starts: Int64[np.ndarray, " n"], counts: Int64[np.ndarray, " n"]
) -> Int64[np.ndarray, " total"]:
    """starts[i], ..., starts[i] + counts[i] - 1 for each i, end to end."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())
