"""A hash of a model's weights, made where they are."""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, UInt32

from engine.models import Decoder
from engine.parallel.sharding import whole

_LANES = 4  # of 32 bits


def fingerprint(decoder: Decoder) -> bytes:
    """16 bytes a parameter that say which weights are computed with.

    Weights in the dtype of the computation count, element by element with their place:
    not how they are stored, sharded or padded, nor where they were read from. Made to
    tell models apart, not to withstand someone who makes two of one fingerprint.
    """
    table = decoder.config.parameters()
    rows: dict[Any, int] = {
        path: one.shape[0] for path, one in table.items() if not one.stacked
    }

    def all_lanes(params: Any) -> dict[str, Array]:
        return {
            ".".join(map(str, path)): _lanes(
                x[...][: rows.get(path)].astype(decoder.dtype)
            )
            for path, x in nnx.to_flat_state(params)
        }

    state = nnx.state(decoder)
    everywhere = whole(jax.tree.leaves(state)[0])
    found = jax.device_get(jax.jit(all_lanes, out_shardings=everywhere)(state))
    # Two parameters that change places are another model.
    return b"".join(
        name.encode() + np.asarray(found[name]).tobytes() for name in sorted(found)
    )


def _lanes(x: Array) -> UInt32[Array, " 4"]:
    """Sums, modulo 2**32, of each element's bits mixed with its place.

    Sums of whole numbers are the same in any order, and so on any mesh.
    """
    kind = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        index = lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place = _mix(place + index + jnp.uint32(axis + 1))
    lanes = []
    for lane in range(_LANES):
        # Odd, so that no place is lost; other bits at a place are another number.
        own = jnp.uint32(2 * zlib.crc32(b"lane %d" % lane) % 2**32 + 1)
        mixed = _mix(_mix(bits ^ own) + place * own)
        lanes.append(jnp.sum(mixed, dtype=jnp.uint32))
    return jnp.stack(lanes) + jnp.uint32(math.prod(x.shape) % 2**32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32 bits of which each depends on all (MurmurHash3's last step)."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
