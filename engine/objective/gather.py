"""Moving the scored rows of the hidden states together, forwards and backwards."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


@jax.custom_vjp
def take_distinct_rows(
    x: Shaped[Array, "N D"], index: Int[Array, " T"], used: Bool[Array, " T"]
) -> Shaped[Array, "T D"]:
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
