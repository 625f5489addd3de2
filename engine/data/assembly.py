"""Tokens of pairs, put together to a batch of one shape."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from engine.data.shapes import Shape
from engine.data.tokenization import PairTokens, ragged_arange
from engine.parallel.batch import (
    PADDED,
    Arrangement,
    Batch,
    KeySpans,
    ModelRows,
    Pairs,
    ScoredTokens,
)

_PAIRS_AT_ONCE = 4096  # whose tokens are compared: bounds the memory that it takes


def assemble(
    pairs: PairTokens,
    members: Int64[np.ndarray, "A N P"],
    shape: Shape,
    own: Sequence[int] | None = None,
    num_scored: Int64[np.ndarray, " sequences"] | None = None,
    arrangement: Arrangement = PADDED,
    shared: Int64[np.ndarray, " pairs"] | None = None,
) -> tuple[Batch, int]:
    """The batch of the pairs `members` (-1: a padding pair), and its number of tokens.

    `shape` is (S, T): the length of a row, into which the arrangement must fit, and at
    least the scored tokens of each shard's microbatch. What sequences share counts in
    the number of tokens for each of them.

    Args:
        own: the shards of which tokens are read; None: all.
        num_scored: `pairs.num_scored`, where it is known.
        shared: `shared_lengths(pairs)`, where the arrangement needs and one knows them.
    """
    (A, N, P), (S, T) = members.shape, shape
    real = members >= 0
    num_scored = pairs.num_scored if num_scored is None else num_scored
    start, size, count_ANQ = _sequences(pairs, members, num_scored)
    num_tokens = int(size.sum())
    assert count_ANQ.sum(axis=2).max() <= T
    head = np.zeros_like(members)
    if arrangement.share_prompt:
        shared = shared_lengths(pairs) if shared is None else shared
        head = np.where(real, shared[members], 0)
    count = count_ANQ
    if own is not None:
        start, size, count, head = (x[:, list(own)] for x in (start, size, count, head))
        N = len(own)

    W = arrangement.rows(P)
    pieces = _pieces(start, size, head, S, arrangement)
    shard = np.arange(A * N).reshape(A, N, 1)
    tokens = np.zeros(A * N * W * S, np.int32)
    source = ragged_arange(pieces.source.ravel(), pieces.size.ravel())
    begin = pieces.begin + shard * W * S
    at = ragged_arange(begin.ravel(), pieces.size.ravel())
    tokens[at] = pairs.tokens[source]
    scored = pairs.scored[source]

    # Filled from the left, sequence after sequence: where each one's tokens go.
    place = np.cumsum(count, axis=2) - count + shard * T
    place = ragged_arange(place.ravel(), count.ravel())
    positions, targets = np.zeros((2, A * N * T), np.int32)
    # A token is scored from the state before it, which a shard counts from its own.
    positions[place] = (at[scored] - 1) % (W * S)
    targets[place] = pairs.tokens[source[scored]]
    built = ScoredTokens(
        positions=positions.reshape(A, N, T),
        targets=targets.reshape(A, N, T),
        counts=count.astype(np.int32),
    )
    check_distinct(built)
    spans = None
    if arrangement.with_spans:
        spans = _spans(pieces, at, (A, N * W, S))
    batch = Batch(
        rows=ModelRows(tokens=tokens.reshape(A, N * W, S), spans=spans),
        scored=built._replace(counts=count_ANQ.astype(np.int32)),
        pairs=Pairs(
            weights=np.where(real, pairs.weights[members], np.float32(0)),
            ref_logps=pairs.ref_logps_of(members),
        ),
    )
    return batch, num_tokens


def _sequences(
    pairs: PairTokens,
    members: Int64[np.ndarray, "A N P"],
    num_scored: Int64[np.ndarray, " sequences"],
) -> tuple[Int64[np.ndarray, "A N Q"], ...]:
    """Where each shard's sequences begin, their tokens, and how many are scored.

    The chosen ones of its pairs, then the rejected ones; 0 of a padding pair's.
    """
    sequence_ANQ = np.concatenate([2 * members, 2 * members + 1], axis=2)
    real_ANQ = np.concatenate([members, members], axis=2) >= 0
    start = np.where(real_ANQ, pairs.offsets[sequence_ANQ], 0)
    size = np.where(real_ANQ, pairs.offsets[sequence_ANQ + 1], 0) - start
    return start, size, np.where(real_ANQ, num_scored[sequence_ANQ], 0)


class _Pieces(NamedTuple):
    """Runs of tokens that lie together: of each sequence, then what pairs share."""

    source: Int64[np.ndarray, "A N R"]  # where each begins in the data
    size: Int64[np.ndarray, "A N R"]
    begin: Int64[np.ndarray, "A N R"]  # where it begins in its shard's rows
    first: Int64[np.ndarray, "A N R"]  # and where its group does
    head: Int64[np.ndarray, "A N R"]  # shared tokens that it goes on from


def _pieces(
    start: Int64[np.ndarray, "A N Q"],
    size: Int64[np.ndarray, "A N Q"],
    head: Int64[np.ndarray, "A N P"],
    length: int,
    arrangement: Arrangement,
) -> _Pieces:
    """Where the sequences of each shard lie in its rows of this length."""
    P = head.shape[2]
    head_ANQ = np.concatenate([head, head], axis=2)
    own = size - head_ANQ
    group = own
    if arrangement.share_prompt:
        group = head + own[..., :P] + own[..., P:]
    if arrangement.packing:
        end = np.cumsum(group, axis=2)
        first = end - group
        assert end.max() <= length
    else:
        first = np.broadcast_to(np.arange(group.shape[2]) * length, group.shape)
        assert group.max() <= length
    if not arrangement.share_prompt:
        return _Pieces(start, size, first, first, head_ANQ)
    chosen = first + head

    def together(*x: np.ndarray) -> np.ndarray:
        return np.concatenate(x, axis=2)

    return _Pieces(
        source=together(start + head_ANQ, start[..., :P]),
        size=together(own, head),
        begin=together(chosen, chosen + own[..., :P], first),
        first=together(first, first, first),
        head=together(head_ANQ, np.zeros_like(head)),
    )


def _spans(
    pieces: _Pieces, at: Int64[np.ndarray, " tokens"], shape: tuple[int, int, int]
) -> KeySpans:
    """Which keys each token sees; `at`: where the tokens of the pieces are."""
    length, sizes = shape[-1], pieces.size.ravel()
    first, begin = pieces.first % length, pieces.begin % length
    alone = np.tile(np.arange(length, dtype=np.int32), shape[0] * shape[1])

    def spread(values: Int64[np.ndarray, "A N R"]) -> np.ndarray:
        of_tokens = alone.copy()
        of_tokens[at] = np.repeat(values.ravel(), sizes)
        return of_tokens.reshape(shape)

    return KeySpans(
        first=spread(first), shared_end=spread(first + pieces.head), begin=spread(begin)
    )


def shared_lengths(pairs: PairTokens) -> Int64[np.ndarray, " pairs"]:
    """How many tokens both sequences of each pair begin with, to be in memory once.

    That ends before the state from which either one's first token is scored: each has
    that state to itself, so that none is scored twice.
    """
    scored = np.flatnonzero(pairs.scored)
    first = scored[np.searchsorted(scored, pairs.offsets[:-1])] - pairs.offsets[:-1]
    most = first.reshape(-1, 2).min(axis=1) - 1
    shared = np.empty_like(most)
    start = pairs.offsets[:-1].reshape(-1, 2)
    for begin in range(0, len(most), _PAIRS_AT_ONCE):
        some = slice(begin, begin + _PAIRS_AT_ONCE)
        chosen, rejected = (ragged_arange(x, most[some]) for x in start[some].T)
        differ = np.flatnonzero(pairs.tokens[chosen] != pairs.tokens[rejected])
        ends = np.cumsum(most[some])
        begins = ends - most[some]
        found = np.append(differ, ends[-1])[np.searchsorted(differ, begins)]
        shared[some] = np.minimum(found, ends) - begins
    return shared


def check_distinct(scored: ScoredTokens) -> None:
    """That no hidden state is scored twice: its gradient would come from one only."""
    A, N, T = scored.positions.shape
    count = scored.counts.sum(axis=2, keepdims=True)
    used = np.arange(T) < count
    shard = np.arange(A * N, dtype=np.int64).reshape(A, N, 1)
    states = (shard * (int(scored.positions.max()) + 1) + scored.positions)[used]
    assert len(np.unique(states)) == len(states), "a hidden state is scored twice"
