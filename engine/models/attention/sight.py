"""Who sees whom, for attention that goes over keys a tile at a time."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from engine.parallel.batch import KeySpans


class Sight(NamedTuple):
    """Which keys the queries of each tile see; tiles of keys are of the same size."""

    # Of the tiles of queries; None: each query sees what its row has up to it.
    spans: KeySpans | None
    window: Int[Array, ""] | None  # tokens of its sequence that a query sees
    first: Int[Array, " tiles"]  # the first tile of keys that any query of a tile sees

    @classmethod
    def of(
        cls,
        spans: KeySpans | None,
        window: int | Int[Array, ""] | None,
        tiles: int,
        size: int,
    ) -> "Sight":
        """That of rows which are padded to so many tiles of this size."""
        length = tiles * size
        if window is not None:
            window = jnp.asarray(window, jnp.int32)
        if spans is None:
            lowest = jnp.zeros((tiles, 1, size), jnp.int32)
            if window is not None:
                lowest += jnp.arange(length).reshape(tiles, 1, size) + 1 - window
            first = jnp.maximum(lowest.min(axis=(1, 2)), 0) // size
            return cls(None, window, first)

        def tiled(x: Any) -> Int[Array, "tiles R s"]:
            rest = jnp.arange(x.shape[1], length, dtype=x.dtype)  # that see themselves
            rest = jnp.broadcast_to(rest, (x.shape[0], len(rest)))
            whole = jnp.concatenate([x, rest], axis=1)
            return whole.reshape(-1, tiles, size).transpose(1, 0, 2)

        spans = KeySpans(*(tiled(x) for x in spans))
        lowest = jnp.where(spans.first < spans.shared_end, spans.first, spans.begin)
        if window is not None:
            index = jnp.arange(length).reshape(tiles, 1, size)
            # Of the shared part, and where that is out of sight, of a token's own.
            near = index - spans.begin + spans.shared_end - window + 1
            own = jnp.maximum(spans.begin, index - window + 1)
            shared = jnp.maximum(spans.first, near)
            lowest = jnp.where(shared < spans.shared_end, shared, own)
        return cls(spans, window, lowest.min(axis=(1, 2)) // size)

    def seen(
        self, query_tile: Int[Array, ""], key_tile: Int[Array, ""], size: int
    ) -> Bool[Array, "#R s t"]:
        """Whether each query of a tile sees each key of another."""
        query = query_tile * size + jnp.arange(size)[None, :, None]
        key = key_tile * size + jnp.arange(size)[None, None, :]
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
