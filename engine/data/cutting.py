"""Encoded pairs, cut to the limits of length."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from engine.data.drops import after_cutting
from engine.data.encoder import Ragged, ragged_arange
from engine.data.pair_tokens import Limits, PairTokens


class EncodedPairs(NamedTuple):
    """Some pairs, in the order of their rows."""

    rows: list[int]
    weights: list[float]
    prompts: Ragged
    sequences: Ragged  # chosen0, rejected0, chosen1, ...
    # Whether each of their tokens may be scored; None: each may.
    mask: Bool[np.ndarray, " tokens"] | None


def cut_pairs(
    some: EncodedPairs,
    boundary: Int64[np.ndarray, " pairs"],
    bos: int | None,
    limits: Limits,
) -> PairTokens:
    """Applies the limits, and drops pairs of which a side has nothing left to score.

    Args:
        boundary: tokens at the start of both sequences that are the prompt.
    """
    pairs = some.sequences
    start, end = pairs.offsets[:-1].copy(), pairs.offsets[1:].copy()
    # A limit beyond all tokens means none; sums with it must not leave int64.
    beyond = len(pairs.values) + 1
    limits = limits.at_most(beyond)
    origin, behind = start.copy(), end.copy()
    score_at = start + np.repeat(boundary, 2)
    before = _scorable(np.maximum(score_at, start + 1), end, some.mask)
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
    kept = np.flatnonzero(_scorable(score_at, end, some.mask))
    sequences = (2 * kept[:, None] + np.arange(2)).ravel()
    size = (end - start)[sequences]
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(size)])
    source = ragged_arange(start[sequences], size)
    scored = source >= np.repeat(score_at[sequences], size)
    if some.mask is not None:
        scored &= some.mask[source]
    with_bos = np.flatnonzero(keeps_bos[sequences])
    source[offsets[with_bos]] = origin[sequences[with_bos]]
    rows = np.array(some.rows, np.int64)
    lost = np.stack([start - origin, behind - end], axis=1)[sequences]
    return PairTokens(
        tokens=pairs.values[source],
        scored=scored,
        offsets=offsets,
        completion_start=(score_at - start)[sequences].astype(np.int32),
        rows=rows[kept],
        weights=np.array(some.weights, np.float32)[kept],
        drops=after_cutting(rows, kept, before),
        cut=lost.astype(np.int32),
    )


def _scorable(
    start: Int64[np.ndarray, " sequences"],
    end: Int64[np.ndarray, " sequences"],
    mask: Bool[np.ndarray, " tokens"] | None,
) -> Bool[np.ndarray, " pairs"]:
    """Which pairs have a token to score between start and end on both sides."""
    there = end > start
    if mask is not None:
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(mask)])
        there &= before[end] > before[np.minimum(start, end)]
    return there.reshape(-1, 2).all(axis=1)


def _begins_with(pairs: Ragged, bos: int | None) -> Bool[np.ndarray, " sequences"]:
    begins = np.zeros(len(pairs.offsets) - 1, np.bool_)
    filled = np.diff(pairs.offsets) > 0
    if bos is not None:
        begins[filled] = pairs.values[pairs.offsets[:-1][filled]] == bos
    return begins
