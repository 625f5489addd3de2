"""Batches of static shapes: a pure function of data, settings and step.

`Order` says which pairs make up a batch, `Layout` how they are laid out in rows, and
`BatchPlan` puts both together for a run.
"""

import copy
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from engine.data.layouts import Layout
from engine.data.pair_tokens import PairTokens
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


class BatchPlan:
    """The batches of a run, and the few shapes that they take.

    Nothing depends on what was asked for before, so that a run can resume anywhere.

    Args:
        steps: how many batches the run has, over all epochs; None: one epoch.
        layout: how pairs are laid out, for the same number of pairs a batch.
    """

    def __init__(self, order: Order, layout: Layout, steps: int | None = None):
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
        other.layout = self.layout.of(pairs)
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
                yield self.layout.build(members, self.shapes)
            epoch, index = epoch + 1, 0

    def epochs_done(self, steps: int, microbatch: int) -> float:
        """Epochs after so many steps, counted in microbatches of so many pairs."""
        order = self.order
        epoch, index = divmod(steps - 1, order.batches_per_epoch)
        done = min((index + 1) * order.pairs_per_batch, order.pairs_per_epoch)
        return epoch + -(-done // microbatch) / -(-order.pairs_per_epoch // microbatch)


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
