"""Token ids of preference pairs, and which of them are scored.

Ids and boundaries are those of `DPOTrainer` in trl 1.16, which tokenises prompt and
prompt + completion each as a whole, so that tokens may merge across the boundary.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64
from transformers import PreTrainedTokenizerBase

from engine.data.conversations import Texts, row_texts
from engine.data.doubts import Doubts
from engine.data.encoder import Ragged, TextEncoder, ragged_arange
from engine.data.forms import PairRow, read_pairs
from engine.data.id_pairs import PairIds
from engine.data.pair_tokens import Limits, PairTokens, Score
from engine.data.rows import PreferenceRows
from engine.data.templates import ChatTemplate
from engine.data.turns import Turns
from engine.errors import InputError

logger = logging.getLogger(__name__)

_CHUNK = 1000  # rows tokenised at a time


class _Some(NamedTuple):
    """Some pairs, in the order of their rows."""

    rows: list[int]
    weights: list[float]
    prompts: Ragged
    sequences: Ragged  # chosen0, rejected0, chosen1, ...
    # Whether each of their tokens may be scored; None: each may.
    mask: Bool[np.ndarray, " tokens"] | None


class PairEncoder:
    """Tokenises rows, some at a time.

    Args:
        tools: for the chat template, where a row has none of its own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        score: Score,
        tools: Sequence[Mapping[str, Any]] | None,
    ):
        self._encode = TextEncoder(tokenizer)
        self._template = ChatTemplate(tokenizer)
        self._turns = Turns(tokenizer, self._encode.rendered, score)
        self._tokenizer = tokenizer
        self._limits = limits
        self._tools = None if tools is None else list(map(dict, tools))
        self.score: Score = score
        self.doubts = Doubts()
        self.pairs = 0  # seen so far, those that are left out too
        self.unstable = 0  # of these, whose prompt's tokens change before an answer

    def __call__(
        self, first: int, batch: Sequence[Mapping[str, Any]], rows: PreferenceRows
    ) -> PairTokens:
        """The pairs of a batch of rows that begins with row `first`.

        Raises:
            InputError: a row that is not a preference pair, naming it.
        """
        numbers: list[int] = []
        found: list[PairRow | PairIds] = []
        for number, row in enumerate(batch, start=first):
            for pair in read_pairs(row, rows.where(number)):
                self.pairs += 1
                if isinstance(pair, PairRow):
                    if pair.tools is None:
                        pair = replace(pair, tools=self._tools)
                    self.doubts.see_row(number, pair)
                numbers.append(number)
                found.append(pair)
        weightless = sum(pair.weight == 0 for pair in found)
        some = self._tokens(numbers, found, rows)
        boundary = _boundaries(some.prompts, some.sequences)
        self.unstable += int((boundary < np.diff(some.prompts.offsets)).sum())
        pairs = _cut(some, boundary, self._encode.bos, self._limits)
        self.doubts.see_pairs(pairs)
        return replace(pairs, weightless=weightless)

    def _tokens(
        self, numbers: list[int], found: list[PairRow | PairIds], rows: PreferenceRows
    ) -> _Some:
        """The tokens of pairs that weigh something."""
        kept = [
            (n, pair) for n, pair in zip(numbers, found, strict=True) if pair.weight
        ]
        prompts: list[list[int]] = [[]] * len(kept)
        sequences: list[list[int]] = [[]] * (2 * len(kept))
        places, texts = [], []
        for i, (number, pair) in enumerate(kept):
            where = rows.where(number)
            if isinstance(pair, PairIds):
                self._check_ids(pair, where)
                prompts[i] = pair.prompt
                sequences[2 * i] = pair.prompt + pair.chosen
                sequences[2 * i + 1] = pair.prompt + pair.rejected
                continue
            text = row_texts(pair, where, self._template, self._encode.eos_text)
            self.doubts.see_texts(number, text)
            places.append(i)
            texts.append(text)
        if texts:
            first, last = kept[places[0]][0], kept[places[-1]][0]
            where = f"{rows.where(first)}, and the {last - first} rows after it"
            encoded = self._encode(texts, where)
            for k, i in enumerate(places):
                prompts[i], sequences[2 * i], sequences[2 * i + 1] = encoded[k]
        masks: dict[int, Bool[np.ndarray, " _"]] = {}
        for i, text in zip(places, texts, strict=True):
            for side, name in enumerate(("chosen", "rejected")):
                where = f"{rows.where(kept[i][0])}, field {name!r}"
                at = 2 * i + side
                mask = self._mask(text, side, sequences[at], where)
                if mask is not None:
                    masks[at] = mask
        return _Some(
            rows=[number for number, _ in kept],
            weights=[pair.weight for _, pair in kept],
            prompts=Ragged.of(prompts),
            sequences=Ragged.of(sequences),
            mask=_all_masks(sequences, masks),
        )

    def _mask(
        self, text: Texts, side: int, ids: list[int], where: str
    ) -> Bool[np.ndarray, " tokens"] | None:
        if text.sides is None:  # all of a plain text is the assistant's
            return None
        written = (text.chosen, text.rejected)[side]
        return self._turns.mask(text.sides[side], written, ids, where)

    @cached_property
    def _largest_id(self) -> int:
        return max(self._tokenizer.get_vocab().values())

    def _check_ids(self, pair: PairIds, where: str):
        sides = {
            "prompt": pair.prompt,
            "chosen": pair.chosen,
            "rejected": pair.rejected,
        }
        for name, ids in sides.items():
            for token in (min(ids, default=0), max(ids, default=0)):
                if not 0 <= token <= self._largest_id:
                    raise InputError(
                        f"{where}, has the token id {token} in its {name}, but the "
                        f"tokenizer has the ids 0 to {self._largest_id}; tokenise it "
                        "with the model's own tokenizer"
                    )
            if not ids and name != "prompt":
                raise InputError(
                    f"{where}, has no token ids in its {name}; give at least one"
                )


def _all_masks(
    sequences: list[list[int]], masks: Mapping[int, Bool[np.ndarray, " _"]]
) -> Bool[np.ndarray, " tokens"] | None:
    if not masks:
        return None
    return np.concatenate(
        [masks.get(i, np.ones(len(x), np.bool_)) for i, x in enumerate(sequences)]
    )


def encode_pairs(
    rows: PreferenceRows,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    score: Score = "completion",
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> PairTokens:
    """Tokenises every row once, and leaves out pairs with nothing to score.

    Raises:
        InputError: a row that is not a preference pair, naming it; or no pair is left.
    """
    encode = PairEncoder(tokenizer, limits, score, tools)
    parts = [encode(first, batch, rows) for first, batch in rows.batches(_CHUNK)]
    if encode.unstable:
        logger.info(
            "in %d of %d pairs the prompt's tokens change when a completion follows "
            "(merged tokens, or the chat template); scoring starts where they differ",
            encode.unstable,
            encode.pairs,
        )
    sizes = np.concatenate([part.lengths for part in parts])
    result = PairTokens(
        tokens=np.concatenate([part.tokens for part in parts]),
        scored=np.concatenate([part.scored for part in parts]),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]),
        completion_start=np.concatenate([part.completion_start for part in parts]),
        rows=np.concatenate([part.rows for part in parts]),
        weights=np.concatenate([part.weights for part in parts]),
        dropped=sum(part.dropped for part in parts),
        weightless=sum(part.weightless for part in parts),
        doubts=encode.doubts.found(),
        limits=limits,
        score=score,
    )
    if len(result) == 0:
        if result.weightless == encode.pairs:
            raise InputError(
                f"all {encode.pairs} pairs have weight 0, which leaves them out; give "
                "some a weight"
            )
        raise InputError(
            f"none of the {encode.pairs} pairs has a token to score left within "
            f"max_length={limits.max_length} ({limits.truncation_mode}); raise "
            "max_length, set max_prompt_length below it, or use keep_end"
        )
    return result


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
    some: _Some, boundary: Int64[np.ndarray, " pairs"], bos: int | None, limits: Limits
) -> PairTokens:
    """Applies the limits, and drops pairs of which a side has nothing left to score."""
    pairs = some.sequences
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
    there = end > score_at
    if some.mask is not None:
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(some.mask)])
        there &= before[end] > before[np.minimum(score_at, end)]
    kept = np.flatnonzero(there.reshape(-1, 2).all(axis=1))
    sequences = (2 * kept[:, None] + np.arange(2)).ravel()
    size = (end - start)[sequences]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(size)])
    source = ragged_arange(start[sequences], size)
    scored = source >= np.repeat(score_at[sequences], size)
    if some.mask is not None:
        scored &= some.mask[source]
    with_bos = np.flatnonzero(keeps_bos[sequences])
    source[offsets[with_bos]] = origin[sequences[with_bos]]
    return PairTokens(
        tokens=pairs.values[source],
        scored=scored,
        offsets=offsets,
        completion_start=(score_at - start)[sequences].astype(np.int32),
        rows=np.array(some.rows, np.int64)[kept],
        weights=np.array(some.weights, np.float32)[kept],
        dropped=len(boundary) - len(kept),
    )


def _begins_with(pairs: Ragged, bos: int | None) -> Bool[np.ndarray, " sequences"]:
    begins = np.zeros(len(pairs.offsets) - 1, np.bool_)
    filled = np.diff(pairs.offsets) > 0
    if bos is not None:
        begins[filled] = pairs.values[pairs.offsets[:-1][filled]] == bos
    return begins
