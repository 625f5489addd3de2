"""Dropout whose masks are a function of what they fall on, not of where it is.

Whether an element is kept follows from the step's key, the layer, the module, the
tokens of the row, the position in it, and the feature. So it is the same on every mesh
and under every accumulation, and again when a pass is repeated for its gradient; rows
with the very same tokens share a mask within a step.
"""

import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Float, Int, Key, UInt32

_IMPL = "threefry2x32"  # not JAX's default, which the user may have changed
_GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio: an odd step through all integers


def step_key(seed: int, step: Int[Array, ""]) -> Key[Array, ""]:
    """The key of one optimizer step."""
    return jax.random.fold_in(jax.random.key(seed, impl=_IMPL), step)


def _mixed(x: Array) -> Array:
    """A bijection of 32-bit integers in which every bit depends on every bit.

    Source: Appleby 2011, MurmurHash3, the 32-bit finalizer (public domain).
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def row_hashes(tokens: Int[Array, "W S"]) -> UInt32[Array, " W"]:
    """A number for the tokens of each row, however far it is padded with 0."""
    position = jnp.arange(tokens.shape[1], dtype=jnp.uint32)[None, :]
    mixed = _mixed(_mixed(tokens.astype(jnp.uint32)) + position * jnp.uint32(_GOLDEN))
    kept = jnp.where(tokens == 0, jnp.uint32(0), mixed)
    return kept.sum(axis=1, dtype=jnp.uint32)


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """What one layer needs to know to drop elements."""

    rate: float
    key: Key[Array, ""]  # the layer's
    rows: UInt32[Array, " W"]  # `row_hashes`

    def __call__(
        self, x: Float[Array, "W S I"], module: str, first: Int[Array, ""] | int
    ) -> Float[Array, "W S I"]:
        """Elements are 0 with probability `rate`, or else scaled by 1 / (1 - rate).

        `first`: the number of x's first feature, where x holds a part of them.
        """
        W, S, size = x.shape
        key = jax.random.fold_in(self.key, zlib.crc32(module.encode()))
        position = jnp.arange(S, dtype=jnp.uint32)
        # Good random numbers for each token, which are then spread over its features.
        counts = [jnp.repeat(self.rows, S), jnp.tile(position, W)]
        words = threefry_2x32(jax.random.key_data(key), jnp.concatenate(counts))
        one, other = words.reshape(2, W, S, 1)
        feature = jnp.arange(size, dtype=jnp.uint32) + jnp.asarray(first, jnp.uint32)
        spread = (feature * jnp.uint32(_GOLDEN))[None, None, :]
        bits = _mixed(_mixed(one + spread) ^ other)
        keep = bits >= jnp.uint32(min(round(self.rate * 2**32), 2**32 - 1))
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros((), x.dtype))
