"""Causal attention that never holds more than a budget of scores."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

SCORE_BYTES = 128 * 2**20  # float32 scores held at once, per device
_MIN_QUERIES = 128  # a narrower tile of queries would starve the matmul: cut rows first

# Finite, not -inf: a padded query may see no key at all, and must not make a NaN.
_MASKED = float(jnp.finfo(jnp.float32).min)


def attend(
    query: Float[Array, "R S N H"],
    key: Float[Array, "R S K H"],
    value: Float[Array, "R S K H"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | Int[Array, ""] | None = None,
    score_bytes: int = SCORE_BYTES,
) -> Float[Array, "R S N H"]:
    """softmax(cap(scale * q . k)) v over keys at and before the query.

    Scores and softmax are float32. Rows are padded on the right, so causality alone
    hides padding. Where all scores take more than `score_bytes`, tiles of rows and
    queries are scanned and recomputed in the backward pass.

    Args:
        window: how many keys a query sees, itself included; None: all before it.
    """
    rows, length, heads, _ = query.shape
    row_tile, query_tile = _tiles(rows, length, heads, score_bytes)

    def tile(query_RsNH, key_RSKH, value_RSKH, start):
        return _attend_tile(
            query_RsNH,
            key_RSKH.astype(query.dtype),
            value_RSKH.astype(query.dtype),
            start,
            scale=scale,
            softcap=softcap,
            window=window,
        )

    if (row_tile, query_tile) == (rows, length):
        return tile(query, key, value, 0)

    def rows_of(args):
        query_RSNH, key_RSKH, value_RSKH = args
        # The scan sums the gradients of keys and values over query tiles in this dtype.
        key_RSKH = key_RSKH.astype(jnp.float32)
        value_RSKH = value_RSKH.astype(jnp.float32)
        count = -(-length // query_tile)
        pad = ((0, 0), (0, count * query_tile - length), (0, 0), (0, 0))
        tiles = jnp.pad(query_RSNH, pad).reshape(
            row_tile, count, query_tile, *query.shape[2:]
        )
        once = jax.checkpoint(tile, prevent_cse=False)
        out = lax.map(
            lambda at: once(at[0], key_RSKH, value_RSKH, at[1]),
            (jnp.moveaxis(tiles, 1, 0), jnp.arange(count) * query_tile),
        )
        out = jnp.moveaxis(out, 0, 1).reshape(row_tile, -1, *query.shape[2:])
        return out[:, :length]

    if row_tile == rows:
        return rows_of((query, key, value))
    split = [x.reshape(-1, row_tile, *x.shape[1:]) for x in (query, key, value)]
    return lax.map(rows_of, tuple(split)).reshape(query.shape)


def _tiles(rows: int, length: int, heads: int, budget: int) -> tuple[int, int]:
    """Rows (a divisor) and queries whose float32 scores fit `budget`; 1 at least."""
    per_query = heads * length * 4  # bytes of one row's scores
    if rows * length * per_query <= budget:
        return rows, length
    narrow = min(length, _MIN_QUERIES)
    fitting = [
        r
        for r in range(1, rows + 1)
        if rows % r == 0 and r * narrow * per_query <= budget
    ]
    row_tile = max(fitting, default=1)
    return row_tile, max(1, min(length, budget // (row_tile * per_query)))


def _attend_tile(query, key, value, start, *, scale, softcap, window):
    """Queries `start`, `start + 1`, ... of a few rows against all of their keys."""
    rows, queries, heads, dim = query.shape
    kv_heads, keys = key.shape[2], key.shape[1]
    grouped = query.reshape(rows, queries, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum(
        "RsKGH,RSKH->RKGsS", grouped, key, preferred_element_type=jnp.float32
    )
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    position = start + jnp.arange(queries)
    behind = position[:, None] - jnp.arange(keys)[None, :]
    seen = behind >= 0
    if window is not None:
        seen = seen & (behind < window)
    scores = jnp.where(seen[None, None, None, :, :], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("RKGsS,RSKH->RsKGH", weights, value)
    return out.reshape(query.shape)
