"""Tokens of pairs, put together to a batch of one shape."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from engine.data.shapes import Shape
from engine.data.tokenization import PairTokens, ragged_arange
from engine.parallel.batch import Batch, ModelRows, Pairs, ScoredTokens


def assemble(
    pairs: PairTokens,
    members: Int64[np.ndarray, "A N P"],
    shape: Shape,
    own: Sequence[int] | None = None,
    num_scored: Int64[np.ndarray, " sequences"] | None = None,
) -> tuple[Batch, int]:
    """The batch of the pairs `members` (-1: a padding pair), and its number of tokens.

    `shape` is (S, T): at least each sequence's length, and the scored tokens of each
    shard's microbatch.

    Args:
        own: the shards of which tokens are read; None: all.
        num_scored: `pairs.num_scored`, where it is known.
    """
    (A, N, P), (S, T) = members.shape, shape
    num_scored = pairs.num_scored if num_scored is None else num_scored
    real = members >= 0
    # A shard's sequences: the chosen ones, then the rejected ones.
    sequence_ANQ = np.concatenate([2 * members, 2 * members + 1], axis=2)
    real_ANQ = np.concatenate([real, real], axis=2)
    start = np.where(real_ANQ, pairs.offsets[sequence_ANQ], 0)
    size = np.where(real_ANQ, pairs.offsets[sequence_ANQ + 1], 0) - start
    count_ANQ = np.where(real_ANQ, num_scored[sequence_ANQ], 0)
    num_tokens = int(size.sum())
    assert size.max() <= S
    assert count_ANQ.sum(axis=2).max() <= T
    count = count_ANQ
    if own is not None:
        start, size, count = (x[:, list(own)] for x in (start, size, count))
        N = len(own)

    tokens = np.zeros(A * N * 2 * P * S, np.int32)
    source = ragged_arange(start.ravel(), size.ravel())
    at = ragged_arange(np.arange(size.size) * S, size.ravel())
    tokens[at] = pairs.tokens[source]
    scored = pairs.scored[source]

    # Filled from the left, sequence after sequence: where each one's tokens go.
    shard = np.arange(A * N).reshape(A, N, 1)
    place = np.cumsum(count, axis=2) - count + shard * T
    place = ragged_arange(place.ravel(), count.ravel())
    positions, targets = np.zeros((2, A * N * T), np.int32)
    # A token is scored from the state before it, which a shard counts from its own.
    positions[place] = (at[scored] - 1) % (2 * P * S)
    targets[place] = pairs.tokens[source[scored]]
    built = ScoredTokens(
        positions=positions.reshape(A, N, T),
        targets=targets.reshape(A, N, T),
        counts=count.astype(np.int32),
    )
    check_distinct(built)
    batch = Batch(
        rows=ModelRows(tokens=tokens.reshape(A, N * 2 * P, S)),
        scored=built._replace(counts=count_ANQ.astype(np.int32)),
        pairs=Pairs(
            weights=np.where(real, pairs.weights[members], np.float32(0)),
            ref_logps=pairs.ref_logps_of(members),
        ),
    )
    return batch, num_tokens


def check_distinct(scored: ScoredTokens) -> None:
    """That no hidden state is scored twice: its gradient would come from one only."""
    steps = np.diff(scored.positions, axis=2)
    count = scored.counts.sum(axis=2, keepdims=True)
    used = np.arange(1, scored.positions.shape[2]) < count
    assert (steps[used] > 0).all(), "a hidden state is scored twice"
