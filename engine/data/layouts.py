"""How the pairs of a batch are laid out in rows, and what shapes that takes."""

import copy
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from engine.data.assembly import assemble, shared_lengths
from engine.data.pair_tokens import PairTokens
from engine.data.shapes import (
    MAX_CANDIDATES,
    SCORED_UNIT,
    Shape,
    choose_buckets,
    length_unit,
    round_up,
)
from engine.errors import InputError
from engine.parallel.batch import PADDED, Arrangement, Batch


class Layout:
    """The rows of a batch, padded on the right to one of a few lengths.

    Args:
        accumulation: A, microbatches in a batch.
        shards: N, devices over which the pairs of a microbatch are split.
        option: what a user calls `pairs_per_batch`.
        own: the shards that are built here; None: all.
        arrangement: how sequences are laid out in rows.
    Raises:
        InputError: batches that cannot be split so.
    """

    def __init__(
        self,
        pairs: PairTokens,
        pairs_per_batch: int,
        accumulation: int,
        shards: int,
        option: str = "pairs_per_batch",
        own: Sequence[int] | None = None,
        arrangement: Arrangement = PADDED,
    ):
        self._pairs = pairs
        self.arrangement = arrangement
        self.grid = grid_of(pairs_per_batch, accumulation, shards, option)
        self._own = own
        lengths = pairs.lengths.reshape(-1, 2)
        self._shared = None
        self.tokens = lengths.sum(axis=1)  # of each pair that go through the model
        if arrangement.share_prompt:
            self._shared = shared_lengths(pairs)
            self.tokens = self.tokens - self._shared
        # What a pair takes of its row, or of the longer one of its two.
        self._lengths = lengths.max(axis=1)
        if arrangement.with_spans:
            self._lengths = self.tokens
        self._num_scored = pairs.num_scored
        self._scored = self._num_scored.reshape(-1, 2).sum(axis=1)

    def of(self, pairs: PairTokens) -> "Layout":
        """The same of the same tokens, with what else `pairs` says of them."""
        other = copy.copy(self)
        other._pairs = pairs
        return other

    def needs(
        self, members: Int64[np.ndarray, "batches pairs"]
    ) -> tuple[Int64[np.ndarray, " batches"], Int64[np.ndarray, " batches"]]:
        """The least S and T that each batch fits into."""
        real = members >= 0

        def by_shard(values: np.ndarray) -> np.ndarray:
            held = np.where(real, values[members], 0)
            return held.reshape(len(members), -1, self.grid[2])

        lengths = by_shard(self._lengths)
        of_row = np.sum if self.arrangement.packing else np.max
        longest = of_row(lengths, axis=2).max(axis=1)
        return longest, by_shard(self._scored).sum(axis=2).max(axis=1)

    def shapes(
        self,
        longest: Int64[np.ndarray, " batches"],
        most: Int64[np.ndarray, " batches"],
    ) -> tuple[Shape, ...]:
        """The few shapes that batches with these needs are given, ascending.

        A batch takes the first that it fits into; each is the first for some batch.
        """
        unit = length_unit(self.arrangement)
        unit *= -(-int(longest.max()) // (unit * MAX_CANDIDATES))
        rounded = -(-longest // unit) * unit
        candidates, counts = np.unique(rounded, return_counts=True)
        buckets = choose_buckets(candidates, np.cumsum(counts) / len(longest))
        capacities = (int(most[longest <= bucket].max()) for bucket in buckets)
        return tuple(
            (bucket, round_up(capacity, SCORED_UNIT))
            for bucket, capacity in zip(buckets, capacities, strict=True)
        )

    def largest(self) -> Shape:
        """What any batch of these pairs fits into."""
        pairs = self.grid[2] if self.arrangement.packing else 1
        longest = int(np.sort(self._lengths)[-pairs:].sum())
        most = int(np.sort(self._scored)[-self.grid[2] :].sum())
        unit = length_unit(self.arrangement)
        return round_up(longest, unit), round_up(most, SCORED_UNIT)

    def build(
        self, members: Int64[np.ndarray, " pairs"], shapes: tuple[Shape, ...]
    ) -> tuple[Batch, int]:
        """The batch of these pairs in the first shape that it fits into: `assemble`."""
        (longest,), (most,) = self.needs(members[None])
        shape = next((s, t) for s, t in shapes if longest <= s and most <= t)
        return assemble(
            self._pairs,
            members.reshape(self.grid),
            shape,
            self._own,
            self._num_scored,
            self.arrangement,
            self._shared,
        )


def grid_of(
    pairs_per_batch: int, accumulation: int, shards: int, option: str
) -> tuple[int, int, int]:
    """Microbatches A of a batch, shards N, and pairs of a shard's microbatch.

    Args:
        option: what a user calls `pairs_per_batch`.
    Raises:
        InputError: batches that cannot be split so.
    """
    if pairs_per_batch < 1 or pairs_per_batch % (accumulation * shards):
        raise InputError(
            f"{option}={pairs_per_batch} pairs cannot be split over {shards} "
            f"devices (data * fsdp) times {accumulation} accumulation steps; make "
            f"it a multiple of {accumulation * shards}"
        )
    return accumulation, shards, pairs_per_batch // (accumulation * shards)
