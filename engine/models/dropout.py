"""Dropout whose masks are a function of what they fall on, not of where it is.

Whether an element is kept follows from the step's key, the layer, the module, the
tokens of the sequence up to it, and the feature. So it is the same on every mesh, under
every accumulation and in every arrangement of rows, and again when a pass is repeated
for its gradient; sequences that begin with the very same tokens share a mask there
within a step.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Float, Int, Key, UInt32

from engine.parallel.batch import KeySpans

_IMPL = "threefry2x32"  # not JAX's default, which the user may have changed
GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio: an odd step through all integers


def step_key(seed: int, step: Int[Array, ""]) -> Key[Array, ""]:
    """The key of one optimizer step."""
    return jax.random.fold_in(jax.random.key(seed, impl=_IMPL), step)


def mixed(x: Array) -> Array:
    """A bijection of 32-bit integers in which every bit depends on every bit.

    Source: Appleby 2011, MurmurHash3, the 32-bit finalizer (public domain).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def prefix_hashes(
    tokens: Int[Array, "W S"], spans: KeySpans | None = None
) -> UInt32[Array, "W S"]:
    """For each token a number of what it sees: its sequence up to and with itself."""
    index = jnp.arange(tokens.shape[1], dtype=jnp.uint32)[None, :]
    position = index if spans is None else spans.positions.astype(jnp.uint32)
    each = mixed(mixed(tokens.astype(jnp.uint32)) + position * jnp.uint32(GOLDEN))
    through = jnp.cumsum(each, axis=1, dtype=jnp.uint32)
    if spans is None:
        return through
    before = jnp.pad(through, ((0, 0), (1, 0)))

    def until(end: Any) -> Array:
        return jnp.take_along_axis(before, end, axis=1)

    return through - until(spans.begin) + until(spans.shared_end) - until(spans.first)


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """What one layer needs to know to drop elements."""

    rate: float
    key: Key[Array, ""]  # the layer's
    prefixes: UInt32[Array, "W S"]  # `prefix_hashes`

    def __call__(
        self, x: Float[Array, "W S I"], module: str, first: Int[Array, ""] | int
    ) -> Float[Array, "W S I"]:
        """Elements are 0 with probability `rate`, or else scaled by 1 / (1 - rate).

        `first`: the number of x's first feature, where x holds a part of them.
        """
        W, S, size = x.shape
        key = jax.random.fold_in(self.key, zlib.crc32(module.encode()))
        # Good random numbers for each token, which are then spread over its features.
        counts = [self.prefixes.reshape(-1), jnp.zeros(W * S, jnp.uint32)]
        words = threefry_2x32(jax.random.key_data(key), jnp.concatenate(counts))
        one, other = words.reshape(2, W, S, 1)
        feature = jnp.arange(size, dtype=jnp.uint32) + jnp.asarray(first, jnp.uint32)
        spread = (feature * jnp.uint32(GOLDEN))[None, None, :]
        bits = mixed(mixed(one + spread) ^ other)
        keep = bits >= jnp.uint32(min(round(self.rate * 2**32), 2**32 - 1))
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros((), x.dtype))
