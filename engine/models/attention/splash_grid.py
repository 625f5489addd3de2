"""Which blocks of queries and keys the kernels of `splash_attention` go over.

JAX's own masks are complete when a program is compiled. Which sequences share a row,
and which part of it a device has, is known in the step: the kernels read the blocks of
their grid from arrays, which are made here. So blocks that causality, a window or other
sequences hide are skipped, and long rows take no time to compile.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask_info as infos,
)
from jaxtyping import Array, Bool, Int

LANES = 128  # blocks are multiples of it
UNIT = 512  # rows are padded to a multiple of it, shorter ones to one of LANES

type Ints = np.ndarray | Array


@dataclass(frozen=True)
class Causal:
    """Whether a query sees a key, by their numbers in rows: the kernels call it."""

    window: int | None = None  # keys, the query's own included; None: all up to it

    def __call__(self, query: Any, key: Any) -> Any:
        """`query` and `key`: numbers of the same shape."""
        seen = key <= query
        return seen if self.window is None else seen & (query - key < self.window)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows that a program is compiled for, whatever sequences are in them."""

    length: int  # queries of a run,
    padded: int  # and with what makes them whole blocks
    keys: int  # of a row, whole blocks
    starts: tuple[int, ...] | None  # of the runs in their row; None: known in the step
    runs: int  # of queries
    reach: int  # how many keys a query sees at most, itself included

    @classmethod
    def of(cls, *, length: int, keys: int, **facts: Any) -> "Rows":
        """Of runs of `length` queries, and so many keys, that are not padded yet."""

        def whole(count: int) -> int:
            unit = LANES if count <= UNIT else UNIT
            return -(-count // unit) * unit

        return cls(length=length, padded=whole(length), keys=whole(keys), **facts)

    @property
    def _within(self) -> np.ndarray:
        """The query of its run that each one is of a padded run.

        Behind a run's last query are its copies: so all see something.
        """
        return np.minimum(np.arange(self.padded, dtype=np.int32), self.length - 1)

    def padded_runs(self, x: Int[Array, "R q"]) -> Int[Array, "R Q"]:
        """A number of each query, in padded runs."""
        runs = x.reshape(x.shape[0], self.runs, self.length)
        return runs[:, :, self._within].reshape(x.shape[0], -1)

    def queries(
        self,
        begin: Int[Array, "R q"] | None = None,
        starts: Int[Array, " runs"] | None = None,
    ) -> "Queries":
        """Those of any row.

        Args:
            begin: where the sequences of each row's queries begin; None: with the row.
            starts: of the runs, where they are known in the step.
        """
        if self.starts is not None:
            runs = np.asarray(self.starts, np.int32)[:, None]
            number: Any = (runs + self._within[None]).reshape(-1)
        else:
            assert starts is not None
            number = (starts[:, None] + self._within[None]).reshape(-1)
        first = number + 1 - self.reach
        if begin is not None:
            first = jnp.maximum(first, self.padded_runs(begin).min(axis=0))
        return Queries(number, first)

    def widths(self, query: int, keys: int) -> "Widths":
        """Of a grid of blocks of so many queries and so many keys."""
        if self.starts is not None:
            seen = self.queries().blocks(query, keys, self.keys // keys)
            seeing = seen.reshape(self.runs, -1, seen.shape[1]).sum(axis=1)
            return Widths(int(seen.sum(axis=1).max()), self.runs * int(seeing.max()))
        # What a block sees, and what sees it in a run, lies together, anywhere.
        most = (
            (size + self.reach - 3) // other + 2
            for size, other in ((query, keys), (keys, query))
        )
        counts = self.keys // keys, self.padded // query
        seen, seeing = map(min, most, counts)
        return Widths(seen, self.runs * seeing)


class Widths(NamedTuple):
    """How many blocks a grid has at most."""

    keys: int  # that any block of queries sees
    queries: int  # that see any block of keys


class Queries(NamedTuple):
    """Queries in their rows; numpy's arrays where a program is compiled for them."""

    number: Int[Ints, " Q"]  # of each in its row of keys: the last that it sees
    first: Int[Ints, " Q"]  # that it sees in any row, if that is in it

    def blocks(self, size: int, keys: int, count: int) -> Bool[Ints, "n m"]:
        """Whether any query of a block of `size` sees any of a block of `keys` keys.

        count: blocks of keys in a row.
        """
        lowest = self.first.reshape(-1, size).min(axis=1)[:, None] // keys
        highest = self.number.reshape(-1, size).max(axis=1)[:, None] // keys
        number = np.arange(count)[None, :]
        return (lowest <= number) & (number <= highest)


def mask_info(
    seen: Bool[Ints, "n m"],
    width: int,
    numbers: Int[Ints, " Q"],
    *,
    by_keys: bool,
    runs: int = 1,
) -> infos.MaskInfo:
    """The grid of one kernel.

    Args:
        seen: whether a block of keys (m) is seen from a block of queries (n).
        width: the most blocks of keys that any block of queries sees.
        numbers: of the queries in their row of keys.
        by_keys: of the kernel that goes over the queries of each block of keys; `width`
            is the most blocks of queries that see one of keys then, of all `runs`.
    """
    xp: Any = np if isinstance(seen, np.ndarray) else jnp
    seen = seen.T if by_keys else seen
    # Of each run those that see a block, or are seen, lie together: no need to sort.
    parts = seen.reshape(seen.shape[0], runs, -1)
    size, step = parts.shape[2], np.arange(width // runs, dtype=np.int32)
    begin = np.arange(runs, dtype=np.int32)[None, :, None] * size
    first = parts.argmax(axis=2)[:, :, None].astype(np.int32) + begin
    count = parts.sum(axis=2)[:, :, None]
    run = step[None, None] < count
    # A step that has nothing to do has the next block that there is something to do
    # with: by keys the other run's, or other heads', else the next queries'.
    following = xp.roll(first, -1, axis=1 if by_keys else 0)
    if by_keys:
        following = xp.where(xp.roll(count, -1, axis=1) > 0, following, first)
    order = xp.where(run, first + step[None, None], following)
    order, run = (x.reshape(x.shape[0], -1) for x in (order, run))
    if by_keys:
        order, run = order.T, run.T
    # These are in scalar memory, where room is scarce.
    dtype = np.int8 if seen.shape[1] <= 1 + np.iinfo(np.int8).max else np.int16
    return infos.MaskInfo(
        data_next=order[None].astype(dtype),
        mask_next=None,
        block_mask=run[None].astype(np.int8),
        partial_mask_blocks=None,
        q_sequence=numbers,  # pyright: ignore[reportArgumentType]
    )
