"""Arrays that stay in the host's memory until a compiled step asks for them."""

from typing import Any

import jax
from jaxtyping import Array

# What a device's copy engine reaches by itself.
HOST = "pinned_host"


def to_host(tree: Any) -> Any:
    """The arrays, or shapes of arrays, sharded as they are, but in the host's memory.

    Each device's shard goes to the host that it belongs to.
    """

    def one(x: Any) -> Any:
        sharding = x.sharding.with_memory_kind(HOST)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.device_put(x, sharding)

    return jax.tree.map(one, tree)


def on_host(x: Any) -> bool:
    """Whether an array, a shape or a tracer is of the host's memory."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def on_device(x: Array) -> Array:
    """In a compiled function: a copy on the device of what is in the host's memory."""
    return jax.device_put(x, jax.memory.Space.Device) if on_host(x) else x
