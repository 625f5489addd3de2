"""Token ids of preference pairs, and which of them are scored.

Ids and boundaries are those of `DPOTrainer` in trl 1.16, which tokenises prompt and
prompt + completion each as a whole, so that tokens may merge across the boundary.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from transformers import PreTrainedTokenizerBase

from engine.data.conversations import Texts, row_texts
from engine.data.cutting import EncodedPairs, cut_pairs
from engine.data.doubts import Doubts
from engine.data.drops import merged, of_rows, reasons
from engine.data.encoder import Ragged, TextEncoder, ragged_arange
from engine.data.forms import PairRow, read_pairs
from engine.data.id_pairs import PairIds
from engine.data.pair_tokens import WEIGHTLESS, Limits, PairTokens, Score
from engine.data.rows import Origins, PreferenceRows
from engine.data.templates import ChatTemplate
from engine.data.turns import Turns
from engine.errors import InputError

logger = logging.getLogger(__name__)

_CHUNK = 1000  # rows tokenised at a time


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
        self, first: int, batch: Sequence[Mapping[str, Any]], rows: Origins
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
        weightless = [
            n for n, pair in zip(numbers, found, strict=True) if pair.weight == 0
        ]
        some = self._tokens(numbers, found, rows)
        boundary = _boundaries(some.prompts, some.sequences)
        self.unstable += int((boundary < np.diff(some.prompts.offsets)).sum())
        pairs = cut_pairs(some, boundary, self._encode.bos, self._limits)
        self.doubts.see_pairs(pairs)
        left_out = of_rows(WEIGHTLESS, np.array(weightless, np.int64))
        return replace(pairs, drops=(*pairs.drops, *left_out))

    def _tokens(
        self, numbers: list[int], found: list[PairRow | PairIds], rows: Origins
    ) -> EncodedPairs:
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
        return EncodedPairs(
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
    """As `encode_rows`.

    Raises:
        InputError: a row that is not a preference pair, naming it; or no pair is left.
    """
    result = encode_rows(rows, tokenizer, limits, score, tools)
    if len(result) == 0:
        raise InputError(
            f"none of the {result.dropped + result.weightless} pairs has a token to "
            f"score: {reasons(result.drops, limits)}"
        )
    return result


def encode_rows(
    rows: PreferenceRows,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    score: Score = "completion",
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> PairTokens:
    """Tokenises every row once, and leaves out pairs with nothing to score.

    Raises:
        InputError: a row that is not a preference pair, naming it.
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
    return PairTokens(
        tokens=np.concatenate([part.tokens for part in parts]),
        scored=np.concatenate([part.scored for part in parts]),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]),
        completion_start=np.concatenate([part.completion_start for part in parts]),
        rows=np.concatenate([part.rows for part in parts]),
        weights=np.concatenate([part.weights for part in parts]),
        drops=merged(drop for part in parts for drop in part.drops),
        cut=np.concatenate([part.cut for part in parts if part.cut is not None]),
        doubts=encode.doubts.found(),
        limits=limits,
        score=score,
    )


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
