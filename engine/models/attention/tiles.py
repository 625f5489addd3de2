"""Attention in plain JAX, a tile of queries and keys at a time, on any device.

Each tile of queries goes over those tiles of keys alone that any of its queries sees,
so that what causality, windows or other sequences hide costs nothing; no more scores
than a tile's are ever held. The backward pass makes them anew.

Letters: K kv heads, G query heads of each (N = K G), s queries and t keys of a tile.

Source: Rabe and Staats 2021, arXiv:2112.05682 (a softmax by tiles); Dao et al. 2022,
arXiv:2205.14135, algorithm 4 (its backward pass).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from engine.models.attention.sight import Grid, Sight
from engine.parallel.batch import KeySpans
from engine.parallel.collectives import zeros_like

TILE = 128  # queries and keys of a tile, at most
SCOPE = "attention"

# Finite, not -inf: a query may see no key of a tile, and must not make a NaN.
_MASKED = float(jnp.finfo(jnp.float32).min)


def attend(
    query: Float[Array, "R Q N H"],
    key: Float[Array, "R S K H"],
    value: Float[Array, "R S K H"],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | Int[Array, ""] | None = None,
    spans: KeySpans | None = None,
    starts: Sequence[int | Int[Array, ""]] = (0,),
    tile: int = TILE,
) -> Float[Array, "R Q N H"]:
    """softmax(cap(scale * q . k)) v over the keys that each query sees.

    Scores and softmax are float32.

    Args:
        window: how many tokens of its sequence a query sees, itself included; None: all
            up to it.
        spans: the keys of each query's sequence; None: all of its row up to it. Rows
            are padded on the right, so causality alone hides padding there.
        starts: queries are so many runs of a row, of equal lengths, which begin there
            in it; keys are whole rows.
    """
    rows, runs, kv_heads = query.shape[0], len(starts), key.shape[2]
    length = query.shape[1] // runs
    count = -(-length // tile)
    size = -(-length // count)
    grid = Grid(runs * count, -(-key.shape[1] // size), size)

    def tiled(x: Array, runs: int) -> Array:
        """[tiles, R, K, .., s, H], the last of each run padded."""
        x = x.reshape(rows, runs, -1, *x.shape[2:])
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % size), (0, 0), (0, 0)))
        x = x.reshape(rows, -1, size, kv_heads, x.shape[3] // kv_heads, x.shape[4])
        return x.transpose(1, 0, 3, 4, 2, 5)

    sight = Sight.of(spans, window, grid, starts)
    keys = (tiled(x, 1)[:, :, :, 0] for x in (key, value))
    scores_of = _Scores(scale, softcap, grid)
    # By this name `planning.hlo` knows its loops, whose lengths are in the data.
    with jax.named_scope(SCOPE):
        out: Any = _attend(scores_of, tiled(query, runs), *keys, sight)
    out = out.transpose(1, 0, 4, 2, 3, 5)
    out = out.reshape(rows, runs, count * size, *query.shape[2:])[:, :, :length]
    return out.reshape(query.shape)


@dataclass(frozen=True)
class _Scores:
    """How scores are made of queries and keys."""

    scale: float
    softcap: float | None
    grid: Grid

    def __call__(
        self,
        query: Float[Array, "R K G s H"],
        key: Float[Array, "R K t H"],
        sight: Sight,
        tiles: tuple[Int[Array, ""], Int[Array, ""]],
    ) -> tuple[Float[Array, "R K G s t"], Float[Array, "R K G s t"] | float]:
        """Scores, and their derivatives by the product of query and key."""
        scores = self.scale * jnp.einsum(
            "RKGsH,RKtH->RKGst", query, key, preferred_element_type=jnp.float32
        )
        slope = self.scale
        if self.softcap is not None:
            bent = jnp.tanh(scores / self.softcap)
            scores = self.softcap * bent
            slope = self.scale * (1 - jnp.square(bent))
        seen = sight.seen(*tiles, self.grid)
        return jnp.where(seen[:, None, None], scores, _MASKED), slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    scores_of: _Scores,
    query: Float[Array, "n R K G s H"],
    key: Float[Array, "m R K t H"],
    value: Float[Array, "m R K t H"],
    sight: Sight,
) -> Float[Array, "n R K G s H"]:
    return _forward(scores_of, query, key, value, sight)[0]


def _forward(
    scores_of: _Scores, query: Array, key: Array, value: Array, sight: Sight
) -> tuple[Array, Any]:
    def of_queries(tile: tuple[Array, Array]) -> tuple[Array, Array]:
        number, query = tile

        def add(at: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            most, total, out = carry
            scores, _ = scores_of(query, key[at], sight, (number, at))
            higher = jnp.maximum(most, scores.max(axis=-1))
            weights = jnp.exp(scores - higher[..., None])
            faded = jnp.exp(most - higher)
            more = jnp.einsum(
                "RKGst,RKtH->RKGsH",
                weights.astype(value.dtype),
                value[at],
                preferred_element_type=jnp.float32,
            )
            total = total * faded + weights.sum(axis=-1)
            return higher, total, out * faded[..., None] + more

        out = zeros_like(query).astype(jnp.float32)
        total = out[..., 0]
        most, total, out = lax.fori_loop(
            sight.first[number],
            sight.end(number, scores_of.grid),
            add,
            (total + _MASKED, total, out),
        )
        return (out / total[..., None]).astype(query.dtype), most + jnp.log(total)

    numbers = jnp.arange(query.shape[0], dtype=jnp.int32)
    out, lse = lax.map(of_queries, (numbers, query))
    return out, (query, key, value, sight, out, lse)


def _backward(
    scores_of: _Scores, saved: Any, dout: Float[Array, "n R K G s H"]
) -> tuple[Array, Array, Array, None]:
    query, key, value, sight, out, lse = saved
    dtype = query.dtype
    # What a score's gradient is measured from: the weights of a query add up to 1.
    mean = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def product(terms: str, *args: Array) -> Array:
        return jnp.einsum(terms, *args, preferred_element_type=jnp.float32)

    def added(total: Array, at: Array, more: Array) -> Array:
        return lax.dynamic_update_index_in_dim(total, total[at] + more, at, axis=0)

    def of_queries(carry: Any, tile: Any) -> tuple[Any, Array]:
        number, query, dout, lse, mean = tile

        def add(at: Array, carry: Any) -> Any:
            dquery, dkey, dvalue = carry
            scores, slope = scores_of(query, key[at], sight, (number, at))
            weights = jnp.exp(scores - lse[..., None])
            dweights = product("RKGsH,RKtH->RKGst", dout, value[at])
            dscores = (weights * (dweights - mean[..., None]) * slope).astype(dtype)
            weights = weights.astype(dtype)
            return (
                dquery + product("RKGst,RKtH->RKGsH", dscores, key[at]),
                added(dkey, at, product("RKGst,RKGsH->RKtH", dscores, query)),
                added(dvalue, at, product("RKGst,RKGsH->RKtH", weights, dout)),
            )

        start = zeros_like(query).astype(jnp.float32), *carry
        end = sight.end(number, scores_of.grid)
        dquery, dkey, dvalue = lax.fori_loop(sight.first[number], end, add, start)
        return (dkey, dvalue), dquery.astype(dtype)

    numbers = jnp.arange(query.shape[0], dtype=jnp.int32)
    start = tuple(zeros_like(x).astype(jnp.float32) for x in (key, value))
    (dkey, dvalue), dquery = lax.scan(
        of_queries, start, (numbers, query, dout, lse, mean)
    )
    return dquery, dkey.astype(key.dtype), dvalue.astype(value.dtype), None


_attend.defvjp(_forward, _backward)
