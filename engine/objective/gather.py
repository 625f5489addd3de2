"""Moving the scored rows of the hidden states together, forwards and backwards."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.custom_vjp
def take_distinct_rows(
    x: Float[Array, "N D"], index: Int[Array, " T"], used: Bool[Array, " T"]
) -> Float[Array, "T D"]:
    """x[index], where no row of x is taken by more than one used entry.

    Entries that are not used may repeat, hold any row, and pass no gradient back. Since
    a row is taken at most once, the gradient is a gather too, not a scatter of rows:
    scatters are slow on TPU, and add in no fixed order on GPU.
    """
    return x[index]


def _forward(x, index, used):
    return x[index], (index, used, jnp.zeros((x.shape[0], 0), x.dtype))


def _backward(saved, dy):
    index, used, like = saved
    T, N = index.shape[0], like.shape[0]
    # Unused entries write to row N, which is cut off.
    slot_N = jnp.full((N + 1,), T, jnp.int32)
    slot_N = slot_N.at[jnp.where(used, index, N)].set(jnp.arange(T, dtype=jnp.int32))
    padded_dy = jnp.concatenate([dy, jnp.zeros((1, dy.shape[1]), dy.dtype)])
    return padded_dy[slot_N[:N]], None, None


take_distinct_rows.defvjp(_forward, _backward)


def compact_index(
    counts: Int[Array, " F"], capacity: int
) -> tuple[Int[Array, " rows"], Int[Array, ""]]:
    """Where the valid rows of F blocks of `capacity` rows are, one block after another.

    Block f is valid in its first counts[f] rows. The first `total` entries of the
    index, of length F * capacity, are the valid rows in order; the rest are 0.
    """
    F = counts.shape[0]
    end_F = jnp.cumsum(counts)
    slot = jnp.arange(F * capacity, dtype=jnp.int32)
    block = jnp.searchsorted(end_F, slot, side="right").astype(jnp.int32)
    block = jnp.minimum(block, F - 1)
    within = slot - (end_F - counts)[block]
    total = end_F[-1]
    return jnp.where(slot < total, block * capacity + within, 0), total
