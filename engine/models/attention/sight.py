"""Who sees whom, for attention that goes over keys a tile at a time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from engine.parallel.batch import KeySpans


class Grid(NamedTuple):
    """Tiles of queries and of keys: numbers that a program is compiled for."""

    queries: int  # tiles of them, of all runs
    keys: int
    size: int  # of each, in tokens


class Sight(NamedTuple):
    """Which keys the queries of each tile see."""

    # Of the tiles of queries; None: each query sees what its row has up to it.
    spans: KeySpans | None
    window: Int[Array, ""] | None  # tokens of its sequence that a query sees
    first: Int[Array, " tiles"]  # the first tile of keys that any query of a tile sees
    # Where in its row each tile of queries begins; None: they are its tiles of keys.
    begin: Int[Array, " tiles"] | None

    @classmethod
    def of(
        cls,
        spans: KeySpans | None,
        window: int | Int[Array, ""] | None,
        grid: Grid,
        starts: Sequence[int | Int[Array, ""]],
    ) -> "Sight":
        """That of queries that are runs of a row; `starts`: where they begin in it.

        spans: of the queries. Each run's last tile is padded.
        """
        tiles, size = grid.queries, grid.size
        runs = len(starts)
        whole = runs == 1 and isinstance(starts[0], int) and starts[0] == 0
        within = jnp.arange(tiles // runs, dtype=jnp.int32) * size
        begin = jnp.concatenate([start + within for start in starts])
        index = begin[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
        index = index[:, None, :]  # of each query in its row
        kept = None if whole else begin
        if window is not None:
            window = jnp.asarray(window, jnp.int32)
        if spans is None:
            lowest = jnp.zeros((tiles, 1, size), jnp.int32)
            if window is not None:
                lowest += index + 1 - window
            first = jnp.maximum(lowest.min(axis=(1, 2)), 0) // grid.size
            return cls(None, window, first, kept)

        def tiled(x: Any) -> Int[Array, "tiles R s"]:
            given = x.reshape(x.shape[0], runs, -1)
            rest = index.reshape(1, runs, -1)[:, :, given.shape[2] :]
            rest = jnp.broadcast_to(rest, (x.shape[0], *rest.shape[1:]))
            padded = jnp.concatenate([given, rest], axis=2)  # what pads sees itself
            return padded.reshape(-1, tiles, size).transpose(1, 0, 2)

        spans = KeySpans(*(tiled(x) for x in spans))
        lowest = jnp.where(spans.first < spans.shared_end, spans.first, spans.begin)
        if window is not None:
            # Of the shared part, and where that is out of sight, of a token's own.
            near = index - spans.begin + spans.shared_end - window + 1
            own = jnp.maximum(spans.begin, index - window + 1)
            shared = jnp.maximum(spans.first, near)
            lowest = jnp.where(shared < spans.shared_end, shared, own)
        return cls(spans, window, lowest.min(axis=(1, 2)) // grid.size, kept)

    def end(self, query_tile: Int[Array, ""], grid: Grid) -> Int[Array, ""]:
        """The tile of keys behind the last one that any query of a tile sees."""
        if self.begin is None:
            return query_tile + 1
        last = self.begin[query_tile] + grid.size - 1
        return jnp.minimum(last // grid.size + 1, grid.keys)

    def seen(
        self, query_tile: Int[Array, ""], key_tile: Int[Array, ""], grid: Grid
    ) -> Bool[Array, "#R s t"]:
        """Whether each query of a tile sees each key of another."""
        begin = query_tile * grid.size
        if self.begin is not None:
            begin = self.begin[query_tile]
        query = begin + jnp.arange(grid.size)[None, :, None]
        key = key_tile * grid.size + jnp.arange(grid.size)[None, None, :]
        own = key <= query
        if self.window is not None:
            own = own & (query - key < self.window)
        if self.spans is None:
            return own
        first, shared_end, begin = (x[query_tile][:, :, None] for x in self.spans)
        shared = (first <= key) & (key < shared_end)
        if self.window is not None:
            # Its distance, were the key right before the query's own tokens.
            shared = shared & (query - begin + shared_end - key < self.window)
        return shared | (own & (begin <= key))
