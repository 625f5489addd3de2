"""Rows in blocks of one size, for what is computed of a block at a time."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def block_sizes(size: int, blocks: int) -> tuple[int, int]:
    """How many blocks, and the size of each: a few more where that needs no padding."""
    blocks = next((n for n in range(blocks, 2 * blocks) if size % n == 0), blocks)
    return blocks, -(-size // blocks)


def in_blocks(x: Array, axis: int, blocks: int, size: int) -> Array:
    """The axis as two, [blocks, size], of which the first one becomes the first of all.

    The last block is filled up with zeros.
    """
    more = [(0, 0)] * x.ndim
    more[axis] = (0, blocks * size - x.shape[axis])
    shape = (*x.shape[:axis], blocks, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(x, more).reshape(shape), axis, 0)


def out_of_blocks(blocks: Array, axis: int, size: int) -> Array:
    """The inverse of `in_blocks`, for an axis of `size`."""
    x = jnp.moveaxis(blocks, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return x[(*(slice(None),) * axis, slice(0, size))]


def compact_index(
    counts: Int[Array, " F"], capacity: int
) -> tuple[Int[Array, " rows"], Int[Array, ""]]:
    """Where the valid rows of F groups of `capacity` rows are, one group after another.

    Group f is valid in its first counts[f] rows. The first `total` entries of the
    index, of length F * capacity, are the valid rows in order; the rest are 0.
    """
    F = counts.shape[0]
    end_F = jnp.cumsum(counts)
    slot = jnp.arange(F * capacity, dtype=jnp.int32)
    group = jnp.searchsorted(end_F, slot, side="right").astype(jnp.int32)
    group = jnp.minimum(group, F - 1)
    within = slot - (end_F - counts)[group]
    total = end_F[-1]
    return jnp.where(slot < total, group * capacity + within, 0), total


def row_slots(
    counts: Int[Array, " F"], capacity: int
) -> tuple[Int[Array, "F capacity"], Bool[Array, "F capacity"]]:
    """Of each row where `compact_index` puts it, and whether it is valid."""
    first_F = jnp.cumsum(counts) - counts
    within = jnp.arange(capacity, dtype=jnp.int32)
    slots = jnp.minimum(first_F[:, None] + within[None], counts.shape[0] * capacity - 1)
    return slots, within[None] < counts[:, None]
