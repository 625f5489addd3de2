"""Batches of a stream: shapes that any batch fits into, and a known number of steps."""

import contextlib
import itertools
from collections.abc import Generator, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from engine.data.layouts import Layout
from engine.data.pair_streams import Pair, PairStream, joined
from engine.data.pair_tokens import PairTokens
from engine.data.shapes import Sizes, stream_shapes
from engine.errors import InputError
from engine.parallel.batch import PADDED, Arrangement, Batch


@runtime_checkable
class Plan(Sizes, Protocol):
    """The batches of a run, all of a few shapes that are known before the first."""

    def batches(self, first: int = 0) -> Iterator[tuple[Batch, int]]:
        """Each batch from number `first` on, with its number of unpadded tokens."""
        ...

    def epochs_done(self, steps: int, microbatch: int) -> float:
        """Epochs after so many steps, counted in microbatches of so many pairs."""
        ...


class StreamPlan:
    """The batches of so many steps, from a stream that starts over where it ends.

    Batch n is a function of data, settings and n. The last batch of a pass is filled up
    with padding pairs, or left out (`drop_last`), as an epoch's.

    Args:
        grid: see `Plan`.
        shuffle: draw pairs from the stream's buffer, by `seed`.
        own: the shards that are built here; None: all.
        arrangement: how sequences are laid out in rows.
    """

    def __init__(
        self,
        stream: PairStream,
        *,
        steps: int,
        grid: tuple[int, int, int],
        shuffle: bool,
        seed: int,
        drop_last: bool = False,
        own: Sequence[int] | None = None,
        arrangement: Arrangement = PADDED,
    ):
        self.stream = stream
        self._own = own
        self.steps = steps
        self.grid = grid
        self.arrangement = arrangement
        self.shapes = stream_shapes(stream.limits, grid[2], arrangement)
        self._shuffle, self._seed, self._drop_last = shuffle, seed, drop_last
        self._ends: list[int] = []  # steps after which a pass has ended

    @property
    def pairs_per_batch(self) -> int:
        """Pairs of one step."""
        return int(np.prod(self.grid))

    def batches(self, first: int = 0) -> Iterator[tuple[Batch, int]]:
        """Each batch from number `first` of the run on, with its number of tokens.

        Those before it are read and tokenised again, but not put together.

        Raises:
            InputError: what reading and tokenising refuses, when it is met.
        """
        step = 0
        self._ends = []
        for number in itertools.count():
            before = step
            with contextlib.closing(self._groups(number)) as groups:
                for pairs, is_last in groups:
                    step += 1
                    if is_last:
                        self._ends.append(step)
                    if step > first:
                        yield self._build(pairs)
                    if step == self.steps:
                        return
            if step == before:
                raise InputError(
                    f"{self.stream.rows.name}: its pairs do not fill one batch of "
                    f"{self.pairs_per_batch}, and drop_last drops it; use smaller "
                    "batches, more data or drop_last: false"
                )

    def _groups(self, number: int) -> Generator[tuple[list[Pair], bool]]:
        """The pairs of each batch of a pass, and whether it is the last one."""
        size, seed = self.pairs_per_batch, self._seed if self._shuffle else None
        with contextlib.closing(self.stream.drawn(number, seed)) as pairs:
            group = list(itertools.islice(pairs, size))
            while group:
                # Looked for now: whether a pass has ended must not depend on how far
                # ahead the thread is that reads.
                following = list(itertools.islice(pairs, size))
                is_last = not following
                if self._drop_last:
                    is_last = len(following) < size
                if len(group) == size or not self._drop_last:
                    yield group, is_last
                group = [] if is_last else following

    def epochs_done(self, steps: int, microbatch: int) -> float:
        """Passes after so many steps; 0 in the first, whose length nobody knows yet."""
        ends = [0, *(end for end in self._ends if end <= steps)]
        if len(ends) == 1:
            return 0.0
        done = len(ends) - 1
        return done + min(1.0, (steps - ends[-1]) / (ends[-1] - ends[-2]))

    def _build(self, group: list[Pair]) -> tuple[Batch, int]:
        members = np.full(self.pairs_per_batch, -1)
        members[: len(group)] = np.arange(len(group))
        return self.layout_of(joined(group)).build(members, self.shapes)

    def layout_of(self, pairs: PairTokens) -> Layout:
        """How batches of these pairs are laid out."""
        return Layout(
            pairs,
            self.pairs_per_batch,
            *self.grid[:2],
            own=self._own,
            arrangement=self.arrangement,
        )
