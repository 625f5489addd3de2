"""Batches of static shapes: a pure function of data, settings, epoch and index."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Float, Int64

from engine.data.batch import Batch
from engine.data.tokenization import PairTokens, ragged_arange
from engine.errors import InputError

_MAX_BUCKETS = 4  # static lengths, and so compilations
_LENGTH_UNIT = 8  # lengths are multiples of it
_SCORED_UNIT = 128  # capacities for scored tokens are multiples of it
_MAX_CANDIDATES = 128  # lengths among which the buckets are chosen
_WORTHWHILE = 0.95  # another bucket must save a twentieth of all padded tokens


class BatchPlan:
    """Which pairs make up each batch of each epoch, and the few shapes that they take.

    Nothing depends on what was asked for before, so that training can resume anywhere.
    `shapes` lists every (length S, capacity T for scored tokens) that may occur; a
    batch takes the first that it fits into. Where two have one S, the second is for
    batches so unlikely that they hardly ever come.

    Args:
        pairs_per_batch: A*B, over all shards and microbatches.
        accumulation: A, microbatches in a batch.
        shards: N, devices over which the pairs of a microbatch are split.
        shuffle: a new order each epoch, from `seed`; else the data's own order.
        drop_last: leave out the pairs that do not fill a batch, instead of filling
            the batch up with pairs of weight 0.
    Raises:
        InputError: pairs that cannot be split so, or do not make up a single batch.
    """

    def __init__(
        self,
        pairs: PairTokens,
        *,
        pairs_per_batch: int,
        accumulation: int = 1,
        shards: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
    ):
        if pairs_per_batch < 1 or pairs_per_batch % (accumulation * shards):
            raise InputError(
                f"a batch of {pairs_per_batch} pairs cannot be split over {shards} "
                f"devices (data * fsdp) times {accumulation} accumulation steps; make "
                f"it a multiple of {accumulation * shards}"
            )
        self.pairs = pairs
        self._lengths = pairs.lengths.reshape(-1, 2).max(axis=1)  # the longer side's
        self._scored = pairs.num_scored.reshape(-1, 2).sum(axis=1)
        self._grid = (accumulation, pairs_per_batch // accumulation)
        self._shards = shards
        self._shuffle = shuffle
        self._seed = seed
        whole, rest = divmod(len(pairs), pairs_per_batch)
        self.batches_per_epoch = whole + bool(rest and not drop_last)
        if self.batches_per_epoch == 0:
            raise InputError(
                f"{len(pairs)} pairs do not fill one batch of {pairs_per_batch}, and "
                "drop_last drops it; use smaller batches, more data or drop_last: false"
            )
        self.shapes = self._choose_shapes()

    def order(self, epoch: int) -> Int64[np.ndarray, " pairs"]:
        """The pairs in the order of use in an epoch (0, 1, ...)."""
        if not self._shuffle:
            return np.arange(len(self.pairs))
        return np.random.default_rng((self._seed, epoch)).permutation(len(self.pairs))

    def batches(self, epoch: int, first: int = 0) -> Iterator[tuple[Batch, int]]:
        """Each batch of an epoch from number `first` on, with its number of tokens.

        The tokens are those of real pairs, prompts included, padding left out.
        """
        order = self.order(epoch)
        for index in range(first, self.batches_per_epoch):
            yield self._build(self._members(order, index))

    def batch(self, epoch: int, index: int) -> tuple[Batch, int]:
        """Batch `index` of an epoch, and its number of tokens, as `batches` has it."""
        if not 0 <= index < self.batches_per_epoch:
            raise IndexError(
                f"{index=} must be at least 0 and below {self.batches_per_epoch}"
            )
        return self._build(self._members(self.order(epoch), index))

    def _members(
        self, order: Int64[np.ndarray, " pairs"], index: int
    ) -> Int64[np.ndarray, "A B"]:
        """The pairs of a batch; -1 where there are no more."""
        size = self._grid[0] * self._grid[1]
        members = np.full(size, -1)
        taken = order[index * size : (index + 1) * size]
        members[: len(taken)] = taken
        return members.reshape(self._grid)

    def _build(self, members: Int64[np.ndarray, "A B"]) -> tuple[Batch, int]:
        real = members >= 0
        longest = self._lengths[members[real]].max()
        scored = np.where(real, self._scored[members], 0)
        most = scored.reshape(-1, self._pairs_per_shard()).sum(axis=1).max()
        length, capacity = next(
            (s, t) for s, t in self.shapes if longest <= s and most <= t
        )
        return assemble(self.pairs, members, length, capacity, self._shards)

    def _choose_shapes(self) -> tuple[tuple[int, int], ...]:
        """See `shapes`."""
        lengths = self._lengths
        unit = _LENGTH_UNIT
        unit *= -(-int(lengths.max()) // (unit * _MAX_CANDIDATES))
        size = self._grid[0] * self._grid[1]
        if self._shuffle:
            rounded = -(-lengths // unit) * unit
            candidates, counts = np.unique(rounded, return_counts=True)
            # How likely no one of a batch's pairs, drawn at random, is longer.
            below = (np.cumsum(counts) / len(lengths)) ** min(size, len(lengths))
            buckets = choose_buckets(candidates, below)
            return self._round((b, t) for b in buckets for t in self._drawn(b))
        # The batches are known, as every epoch has the same.
        used = min(len(lengths), self.batches_per_epoch * size)
        in_batches = np.zeros((2, self.batches_per_epoch * size), np.int64)
        in_batches[:, :used] = lengths[:used], self._scored[:used]
        longest = in_batches[0].reshape(-1, size).max(axis=1)
        per_shard = in_batches[1].reshape(len(longest), -1, self._pairs_per_shard())
        most = per_shard.sum(axis=2).max(axis=1)
        candidates, counts = np.unique(-(-longest // unit) * unit, return_counts=True)
        buckets = choose_buckets(candidates, np.cumsum(counts) / len(longest))
        return self._round((b, int(most[longest <= b].max())) for b in buckets)

    def _drawn(self, length: int) -> tuple[int, int]:
        """Scored tokens of a shard with pairs up to `length`: likely, at most."""
        scored = np.sort(self._scored[self._lengths <= length])
        rest = self._pairs_per_shard() - 1
        most = int(scored[-rest - 1 :].sum())
        # The largest pair, and the rest five standard deviations above their mean.
        likely = scored[-1] + rest * scored.mean() + 5 * rest**0.5 * scored.std()
        return min(math.ceil(likely), most), most

    def _pairs_per_shard(self) -> int:
        return self._grid[1] // self._shards

    def _round(self, shapes: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        """Rounds capacities up, and drops what is then there twice."""
        unit = _SCORED_UNIT
        return tuple(dict.fromkeys((s, -(-t // unit) * unit) for s, t in shapes))


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
    for _ in range(1, min(_MAX_BUCKETS, len(candidates))):
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


def assemble(
    pairs: PairTokens,
    members: Int64[np.ndarray, "A B"],
    length: int,
    capacity: int,
    shards: int,
) -> tuple[Batch, int]:
    """The batch of the pairs `members` (-1: a filler), and its number of tokens.

    Args:
        length: S, at least each sequence's length.
        capacity: T, at least the scored tokens of each shard's microbatch.
    """
    A, B = members.shape
    N, Bl = shards, B // shards
    real = members >= 0
    sequence_A2B = 2 * members[:, None, :] + np.arange(2)[:, None]
    start = np.where(real[:, None], pairs.offsets[sequence_A2B], 0)
    size = np.where(real[:, None], pairs.offsets[sequence_A2B + 1], 0) - start
    skip = np.where(real[:, None], pairs.score_start[sequence_A2B], 0)

    tokens = np.zeros(A * 2 * B * length, np.int32)
    size_R = size.ravel()
    rows_R = np.arange(A * 2 * B) * length
    source = ragged_arange(start.ravel(), size_R)
    tokens[ragged_arange(rows_R, size_R)] = pairs.tokens[source]

    def by_shard(x_A2B: np.ndarray) -> np.ndarray:
        """[A * N, 2 * Bl]: a shard's sequences in a row, the chosen ones first."""
        x = x_A2B.reshape(A, 2, N, Bl)  # Bl is innermost
        return x.transpose(0, 2, 1, 3).reshape(A * N, 2 * Bl)

    start, skip = by_shard(start), by_shard(skip)
    count = by_shard(size) - skip
    assert count.sum(axis=1).max() <= capacity and size.max() <= length
    local = np.broadcast_to(np.arange(2 * Bl), count.shape)
    # Filled from the left, row by row: where each sequence's scored tokens go.
    place = np.cumsum(count, axis=1) - count + np.arange(A * N)[:, None] * capacity
    count_R = count.ravel()
    place = ragged_arange(place.ravel(), count_R)
    positions, targets = np.zeros((2, A * N * capacity), np.int32)
    positions[place] = ragged_arange((local * length + skip - 1).ravel(), count_R)
    targets[place] = pairs.tokens[ragged_arange((start + skip).ravel(), count_R)]
    batch = Batch(
        tokens=tokens.reshape(A, 2, B, length),
        positions=positions.reshape(A, N, capacity),
        targets=targets.reshape(A, N, capacity),
        num_scored=count.reshape(A, N, 2 * Bl).astype(np.int32),
        weights=real.astype(np.float32),
    )
    return batch, int(size.sum())


def prefetch[T](items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """The same items, computed up to `depth` ahead in one background thread.

    What computing an item raises is raised where the item is taken. Closing the
    iterator, or leaving it, ends the thread.
    """
    end = object()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        ahead = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(pool.submit(next, items, end))
            yield item  # pyright: ignore[reportReturnType]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
