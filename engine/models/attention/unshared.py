"""Rows with shared beginnings, laid out for kernels to which a query's keys are a run.

A second sequence that shares its beginning sees two runs of keys: what it shares, and
its own. Here the keys and values of what it shares, which are computed once, are put in
front of its own a second time, so that it sees one run. Attention costs what it would
for sequences that share nothing; all else in a layer is computed once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from engine.parallel.batch import KeySpans


class Unshared(NamedTuple):
    """Longer rows: of S tokens, with some of them twice, and of places for these."""

    source: Int[Array, "R T"]  # the token in each place
    own: Bool[Array, "R T"]  # it is not there a second time
    place: Int[Array, "R S"]  # of each token
    copy: Int[Array, "R S"]  # the place where it is a second time; -1: none
    spans: KeySpans  # of the places, of which none shares its beginning

    @classmethod
    def of(cls, spans: KeySpans, length: int) -> "Unshared":
        """The rows of a batch, in each of which at most two sequences begin alike.

        length: of the longer rows: twice that of rows is enough for all of them.
        """
        first, shared_end, begin = (jnp.asarray(x, jnp.int32) for x in spans)
        last = first.shape[1] - 1
        index = jnp.broadcast_to(jnp.arange(last + 1, dtype=jnp.int32), first.shape)
        shared = shared_end - first
        # Where the second of two sequences begins. The first one's own tokens are right
        # behind what it shares.
        second = (index == begin) & (shared > 0) & (begin != shared_end)
        place = index + jnp.cumsum(jnp.where(second, shared, 0), axis=1)
        start = jnp.take_along_axis(place, begin, axis=1) - shared

        places = jnp.arange(length, dtype=jnp.int32)
        following = jax.vmap(lambda x: jnp.searchsorted(x, places))(place)
        places = jnp.broadcast_to(places, following.shape)
        behind = following > last
        following = jnp.minimum(following, last).astype(jnp.int32)

        def at(x: Array) -> Array:
            return jnp.take_along_axis(x, following, axis=1)

        gap = at(place) - places  # to the next token that is in its own place
        own = gap == 0
        source = jnp.where(own | behind, following, at(shared_end) - gap)
        starts = jnp.where(behind, places, at(start))

        # Of what is shared: the second sequence begins next.
        begins = lax.cummin(jnp.where(second, index, last), axis=1, reverse=True)
        shared_from, shared_to, own_place, is_second = (
            jnp.take_along_axis(x, begins, axis=1)
            for x in (first, shared_end, place, second)
        )
        is_shared = (shared_from <= index) & (index < shared_to) & is_second
        copy = jnp.where(is_shared, own_place - (shared_to - index), -1)
        return cls(source, own, place, copy, KeySpans(starts, starts, starts))

    def attend(
        self,
        kernel: Callable[..., Array],
        query: Float[Array, "R S N H"],
        key: Float[Array, "R S K H"],
        value: Float[Array, "R S K H"],
    ) -> Float[Array, "R S N H"]:
        """What `kernel(query, key, value)` makes of the longer rows, for each token."""
        longer = (
            _spread(x, self.source, self.place, self.copy) for x in (query, key, value)
        )
        return _collect(kernel(*longer), self.source, self.own, self.place)


def _take(x: Float[Array, "R A N H"], index: Int[Array, "R B"]) -> Array:
    return jnp.take_along_axis(x, index[:, :, None, None], axis=1)


@jax.custom_vjp
def _spread(x: Array, source: Array, place: Array, copy: Array) -> Array:
    """Each token in its places."""
    del place, copy
    return _take(x, source)


def _spread_forward(
    x: Array, source: Array, place: Array, copy: Array
) -> tuple[Array, Any]:
    return _take(x, source), (place, copy)


def _spread_backward(kept: Any, grads: Array) -> tuple[Array, None, None, None]:
    # Gathers: a scatter would add up in the dtype, and one after the other on a TPU.
    place, copy = kept
    wide = grads.astype(jnp.float32)
    twice = (copy >= 0)[:, :, None, None]
    second = jnp.where(twice, _take(wide, jnp.maximum(copy, 0)), 0)
    return (_take(wide, place) + second).astype(grads.dtype), None, None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _collect(longer: Array, source: Array, own: Array, place: Array) -> Array:
    """Each token from its own place."""
    del source, own
    return _take(longer, place)


def _collect_forward(
    longer: Array, source: Array, own: Array, place: Array
) -> tuple[Array, Any]:
    return _take(longer, place), (source, own)


def _collect_backward(kept: Any, grads: Array) -> tuple[Array, None, None, None]:
    source, own = kept
    found = jnp.where(own[:, :, None, None], _take(grads, source), 0)
    return found, None, None, None


_collect.defvjp(_collect_forward, _collect_backward)
