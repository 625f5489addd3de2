"""The few static shapes that batches are padded to: each is a compilation."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64

from engine.data.pair_tokens import Limits
from engine.parallel.batch import PADDED, Arrangement

Shape = tuple[int, int]  # length S of a row, capacity T of a shard for scored tokens

MAX_BUCKETS = 4  # static lengths, and so compilations
LENGTH_UNIT = 8  # lengths of rows are multiples of it
PACKED_UNIT = 128  # and those of rows that hold a whole microbatch of it
SCORED_UNIT = 128  # capacities for scored tokens are multiples of it
MAX_CANDIDATES = 128  # lengths among which the buckets are chosen
_WORTHWHILE = 0.95  # another bucket must save a twentieth of all padded tokens
_LEAST = 32  # tokens: no batch of a stream is padded to less than about so many


@runtime_checkable
class Sizes(Protocol):
    """Of batches, what their steps are compiled for."""

    @property
    def steps(self) -> int:
        """How many batches there are."""
        ...

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """What they are padded to, ascending."""
        ...

    @property
    def grid(self) -> tuple[int, int, int]:
        """Microbatches of a batch, shards, and pairs of a shard's microbatch."""
        ...


def length_unit(arrangement: Arrangement) -> int:
    """What the lengths of rows are multiples of."""
    return PACKED_UNIT if arrangement.packing else LENGTH_UNIT


def round_up(number: int, unit: int) -> int:
    """The least multiple of `unit` that is not below."""
    return -(-number // unit) * unit


def choose_buckets(
    candidates: Int64[np.ndarray, " n"], below: Float[np.ndarray, " n"]
) -> list[int]:
    """The few lengths to which batches are padded, ascending, the last one included.

    Minimises the expected length of a batch, where one fits into candidates[i] with
    probability below[i]; stops at the number of buckets where one more saves little.
    """
    # cost[j]: expected length over batches up to candidates[j], the last bucket so far.
    cost = below * candidates
    choices = [np.full(len(candidates), -1)]
    costs = [cost]
    for _ in range(1, min(MAX_BUCKETS, len(candidates))):
        # From bucket i to j: what lies between them is padded to candidates[j].
        total = costs[-1][:, None] + (below - below[:, None]) * candidates
        total[np.tril_indices(len(candidates))] = np.inf
        choices.append(np.argmin(total, axis=0))
        costs.append(np.min(total, axis=0))
    number = 0
    for more in range(1, len(costs)):
        if costs[more][-1] < _WORTHWHILE * costs[number][-1]:
            number = more
    buckets = [len(candidates) - 1]
    for level in range(number, 0, -1):
        buckets.append(int(choices[level][buckets[-1]]))
    return [int(candidates[j]) for j in reversed(buckets)]


def stream_shapes(
    limits: Limits, pairs: int, arrangement: Arrangement = PADDED
) -> tuple[Shape, ...]:
    """A few shapes, of which the last fits whatever is cut to `limits`.

    Lengths are halves of the longest, so that padding at most doubles a batch that is
    longer than the shortest of them. The capacity for scored tokens is the most that
    rows of a length can have, as nothing is known of the pairs.

    Args:
        pairs: of a shard's microbatch.
    """
    prompt, completion, longest = limits[:3]
    assert longest is not None
    if prompt is not None and completion is not None:
        longest = min(longest, prompt + completion)
    # A sequence's first token is never scored, nor more than its completion.
    most = longest - 1 if completion is None else min(longest - 1, completion)
    rows = arrangement.rows(pairs)
    sequences = 2 * pairs // rows  # of a row; nothing may be shared
    longest, most = sequences * longest, sequences * most
    unit = length_unit(arrangement)
    lengths = [round_up(longest, unit)]
    while len(lengths) < MAX_BUCKETS:
        longest = -(-longest // 2)
        if longest < max(_LEAST, unit // 2):
            break
        lengths.append(round_up(longest, unit))
    return tuple(
        (length, round_up(rows * min(length - 1, most), SCORED_UNIT))
        for length in sorted(set(lengths))
    )
