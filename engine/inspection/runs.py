"""One pair, cut as it is trained on, as runs of tokens of one kind."""

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64
from transformers import PreTrainedTokenizerBase

from engine.data.drops import drop_reason
from engine.data.pair_tokens import CUT_AWAY, Limits, PairTokens
from engine.data.rows import PreferenceRows
from engine.data.tokenization import encode_rows

_NO_LIMITS = Limits(None, None, None, "keep_start")


class Kind(Enum):
    """What becomes of a token."""

    PROMPT = "prompt"  # read, not scored
    SCORED = "scored"
    UNSCORED = "unscored"  # read, and of the completion, but not scored
    CUT = "cut"  # left out


class Run(NamedTuple):
    """Tokens of one kind that follow each other."""

    kind: Kind
    ids: tuple[int, ...]


class WholeSequence(NamedTuple):
    """A side of a pair with all its tokens."""

    prompt: tuple[Run, ...]
    completion: tuple[Run, ...]


class ShownPair(NamedTuple):
    """A pair as the model sees it; where it is dropped, as it would be."""

    row: int  # of the mixture, counted from 0
    where: str
    pair: int | None  # its number among the pairs; None: it is dropped
    reason: str | None  # why it is dropped
    weight: float
    sides: tuple[WholeSequence, ...]  # chosen, rejected; none where nothing is scored


def shown_pairs(
    rows: PreferenceRows,
    pairs: PairTokens,
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[Mapping[str, Any]] | None,
    row: int,
) -> Iterator[ShownPair]:
    """The pairs of a row, which is tokenised once more, without a limit.

    Args:
        pairs: what became of all rows.
        tools: as `encode_pairs` was given them.
    """
    limits, score = pairs.limits, pairs.score
    assert limits is not None and score is not None, "made by `tokenize_pairs`"
    one = PreferenceRows(
        sources=rows.sources,
        source_ids=rows.source_ids[row : row + 1],
        indices=rows.indices[row : row + 1],
    )
    whole = encode_rows(one, tokenizer, _NO_LIMITS, score, tools)
    where = rows.where(row)
    pair, last = np.searchsorted(pairs.rows, (row, row + 1)).tolist()
    for i in range(len(whole)):
        before = [_Sequence.of(whole, 2 * i + side) for side in (0, 1)]
        after = [_Sequence.of(pairs, 2 * pair + side) for side in (0, 1)]
        if pair < last and all(map(_is_left_of, after, before)):
            sides = tuple(map(_side, before, after))
            weight = float(pairs.weights[pair])
            yield ShownPair(row, where, pair, None, weight, sides)
            pair += 1
        else:
            sides = tuple(_side(side, None) for side in before)
            reason = drop_reason(CUT_AWAY, limits)
            yield ShownPair(row, where, None, reason, float(whole.weights[i]), sides)
    for drop in whole.drops:
        reason = drop_reason(drop.reason, limits)
        yield from [ShownPair(row, where, None, reason, 1, ())] * drop.num_pairs
    assert pair == last, "a pair that can be scored when cut can be before"


class _Sequence(NamedTuple):
    tokens: Int32[np.ndarray, " S"]
    scored: Bool[np.ndarray, " S"]
    completion_start: int
    cut: tuple[int, int]  # in front, behind

    @classmethod
    def of(cls, pairs: PairTokens, i: int) -> "_Sequence":
        if i >= 2 * len(pairs):
            return cls(np.zeros(0, np.int32), np.zeros(0, np.bool_), 0, (0, 0))
        span = slice(int(pairs.offsets[i]), int(pairs.offsets[i + 1]))
        front, behind = (0, 0) if pairs.cut is None else pairs.cut[i].tolist()
        start = int(pairs.completion_start[i])
        return cls(pairs.tokens[span], pairs.scored[span], start, (front, behind))


def _places(left: _Sequence, whole: _Sequence) -> Int64[np.ndarray, " n"]:
    """Where in the whole sequence the tokens are that are left of it."""
    place = left.cut[0] + np.arange(len(left.tokens))
    if left.cut[0] and whole.tokens[place[0]] != left.tokens[0]:
        place[0] = 0  # a BOS that stays
    return place


def _is_left_of(left: _Sequence, whole: _Sequence) -> bool:
    """Whether one sequence is what cutting leaves of another."""
    if len(left.tokens) + sum(left.cut) != len(whole.tokens) or not len(left.tokens):
        return False
    return np.array_equal(whole.tokens[_places(left, whole)], left.tokens)


def _side(whole: _Sequence, left: _Sequence | None) -> WholeSequence:
    """All tokens of a sequence, of which `left` is trained on."""
    kinds = [Kind.CUT] * len(whole.tokens)
    if left is not None:
        places = _places(left, whole).tolist()
        for place, scored in zip(places, left.scored.tolist(), strict=True):
            read = place < whole.completion_start
            unscored = Kind.PROMPT if read else Kind.UNSCORED
            kinds[place] = Kind.SCORED if scored else unscored
    start = whole.completion_start
    tokens = whole.tokens.tolist()
    return WholeSequence(
        _runs(tokens[:start], kinds[:start]), _runs(tokens[start:], kinds[start:])
    )


def _runs(tokens: Sequence[int], kinds: Sequence[Kind]) -> tuple[Run, ...]:
    found = zip(kinds, tokens, strict=True)
    return tuple(
        Run(kind, tuple(token for _, token in group))
        for kind, group in groupby(found, key=lambda item: item[0])
    )
