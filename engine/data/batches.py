"""Batches of static shapes: a pure function of data, settings and step.

`Order` says which pairs make up a batch, `Padded` how they are laid out in rows, and
`BatchPlan` puts both together for a run.
"""

import copy
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from engine.data.assembly import assemble
from engine.data.shapes import (
    LENGTH_UNIT,
    MAX_CANDIDATES,
    SCORED_UNIT,
    Shape,
    choose_buckets,
    round_up,
)
from engine.data.tokenization import PairTokens
from engine.errors import InputError
from engine.parallel.batch import Batch

# Of more epochs than that not every batch is looked at: one shape fits what may come.
_MOST_EPOCHS = 100


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which pairs make up each batch of each epoch.

    Raises:
        InputError: pairs that do not make up a single batch.
    """

    num_pairs: int
    pairs_per_batch: int
    shuffle: bool = False  # a new order each epoch, from `seed`; else the data's own
    seed: int = 0
    # Leave out the pairs that do not fill a batch, instead of filling it up with
    # padding pairs.
    drop_last: bool = False

    def __post_init__(self):
        if self.batches_per_epoch == 0:
            raise InputError(
                f"{self.num_pairs} pairs do not fill one batch of "
                f"{self.pairs_per_batch}, and drop_last drops it; use smaller batches, "
                "more data or drop_last: false"
            )

    @property
    def batches_per_epoch(self) -> int:
        """How many batches an epoch has."""
        whole, rest = divmod(self.num_pairs, self.pairs_per_batch)
        return whole + bool(rest and not self.drop_last)

    @property
    def pairs_per_epoch(self) -> int:
        """How many pairs an epoch uses."""
        return min(self.num_pairs, self.batches_per_epoch * self.pairs_per_batch)

    def epoch(self, number: int) -> Int64[np.ndarray, "batches pairs"]:
        """The pairs of each batch of an epoch (0, 1, ...); -1 where there are none."""
        order = np.arange(self.num_pairs)
        if self.shuffle:
            rng = np.random.default_rng((self.seed, number))
            order = rng.permutation(self.num_pairs)
        members = np.full(self.batches_per_epoch * self.pairs_per_batch, -1)
        members[: self.pairs_per_epoch] = order[: self.pairs_per_epoch]
        return members.reshape(self.batches_per_epoch, self.pairs_per_batch)


class Padded:
    """One sequence a row, padded on the right to one of a few lengths.

    Args:
        accumulation: A, microbatches in a batch.
        shards: N, devices over which the pairs of a microbatch are split.
        option: what a user calls `pairs_per_batch`.
        own: the shards that are built here; None: all.
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
    ):
        self._pairs = pairs
        self.grid = grid_of(pairs_per_batch, accumulation, shards, option)
        self._own = own
        self._lengths = pairs.lengths.reshape(-1, 2).max(axis=1)  # the longer side's
        self._num_scored = pairs.num_scored
        self._scored = self._num_scored.reshape(-1, 2).sum(axis=1)

    def needs(
        self, members: Int64[np.ndarray, "batches pairs"]
    ) -> tuple[Int64[np.ndarray, " batches"], Int64[np.ndarray, " batches"]]:
        """The least S and T that each batch fits into."""
        real = members >= 0
        longest = np.where(real, self._lengths[members], 0).max(axis=1)
        scored = np.where(real, self._scored[members], 0)
        per_shard = scored.reshape(len(members), -1, self.grid[2]).sum(axis=2)
        return longest, per_shard.max(axis=1)

    def shapes(
        self,
        longest: Int64[np.ndarray, " batches"],
        most: Int64[np.ndarray, " batches"],
    ) -> tuple[Shape, ...]:
        """The few shapes that batches with these needs are given, ascending.

        A batch takes the first that it fits into; each is the first for some batch.
        """
        unit = LENGTH_UNIT
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
        longest = int(self._lengths.max())
        most = int(np.sort(self._scored)[-self.grid[2] :].sum())
        return round_up(longest, LENGTH_UNIT), round_up(most, SCORED_UNIT)

    def build(
        self, members: Int64[np.ndarray, " pairs"], shape: Shape
    ) -> tuple[Batch, int]:
        """The batch of these pairs, and its number of tokens: see `assemble`."""
        members = members.reshape(self.grid)
        return assemble(self._pairs, members, shape, self._own, self._num_scored)


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


class BatchPlan:
    """The batches of a run, and the few shapes that they take.

    Nothing depends on what was asked for before, so that a run can resume anywhere.

    Args:
        steps: how many batches the run has, over all epochs; None: one epoch.
        layout: how pairs are laid out, for the same number of pairs a batch.
    """

    def __init__(self, order: Order, layout: Padded, steps: int | None = None):
        self.order = order
        self.layout = layout
        self.steps = order.batches_per_epoch if steps is None else steps
        epochs = self._epochs()
        needs = [layout.needs(self._members(x)) for x in epochs[:_MOST_EPOCHS]]
        longest, most = (np.concatenate(x) for x in zip(*needs, strict=True))
        self.shapes = layout.shapes(longest, most)
        if len(epochs) > _MOST_EPOCHS:
            self.shapes = tuple(dict.fromkeys((*self.shapes, layout.largest())))

    def of(self, pairs: PairTokens) -> "BatchPlan":
        """The same batches of the same tokens, with what else `pairs` says of them."""
        other = copy.copy(self)
        other.layout = copy.copy(self.layout)
        other.layout._pairs = pairs
        return other

    @property
    def grid(self) -> tuple[int, int, int]:
        """Microbatches of a batch, shards, and pairs of a shard's microbatch."""
        return self.layout.grid

    def _epochs(self) -> range:
        # Without shuffling every epoch has the same batches.
        epochs = -(-self.steps // self.order.batches_per_epoch)
        return range(epochs if self.order.shuffle else 1)

    def _members(self, epoch: int) -> Int64[np.ndarray, "batches pairs"]:
        """The pairs of those of an epoch's batches that the run comes to."""
        left = self.steps - epoch * self.order.batches_per_epoch
        return self.order.epoch(epoch)[:left]

    def batches(self, first: int = 0) -> Iterator[tuple[Batch, int]]:
        """Each batch from number `first` of the run on, with its number of tokens.

        The tokens are those of real pairs, prompts included, padding left out.
        """
        epoch, index = divmod(first, self.order.batches_per_epoch)
        while epoch * self.order.batches_per_epoch < self.steps:
            for members in self._members(epoch)[index:]:
                yield self._build(members)
            epoch, index = epoch + 1, 0

    def epochs_done(self, steps: int, microbatch: int) -> float:
        """Epochs after so many steps, counted in microbatches of so many pairs."""
        order = self.order
        epoch, index = divmod(steps - 1, order.batches_per_epoch)
        done = min((index + 1) * order.pairs_per_batch, order.pairs_per_epoch)
        return epoch + -(-done // microbatch) / -(-order.pairs_per_epoch // microbatch)

    def _build(self, members: Int64[np.ndarray, " pairs"]) -> tuple[Batch, int]:
        longest, most = self.layout.needs(members[None])
        shape = next((s, t) for s, t in self.shapes if longest[0] <= s and most[0] <= t)
        return self.layout.build(members, shape)


def prefetch[T](items: Iterator[T], depth: int = 2) -> Generator[T]:
    """The same items, computed up to `depth` ahead in one background thread.

    What computing an item raises is raised where the item is taken. Closing the
    iterator ends the thread, and closes a generator that the items come from.
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
        if isinstance(items, Generator):
            items.close()
