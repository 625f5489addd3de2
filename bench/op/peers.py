"""What a JAX user writes without this package: full logits, or a chunk at a time.

Logits and softmax are float32 whatever the input dtype, as trainers have them.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int


def log_softmax(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " T"],
) -> Float[Array, " T"]:
    """Normalise every logit, then pick the targets'."""
    logprobs_TV = jax.nn.log_softmax(_logits(hidden, head), axis=-1)
    return jnp.take_along_axis(logprobs_TV, targets[:, None], axis=-1)[:, 0]


def cross_entropy(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " T"],
) -> Float[Array, " T"]:
    """Pick the targets' logits, then subtract the logsumexp: optax's loss."""
    logits_TV = _logits(hidden, head)
    return -optax.softmax_cross_entropy_with_integer_labels(logits_TV, targets)


def _logits(hidden: Array, head: Array) -> Array:
    return jnp.einsum("TD,VD->TV", hidden, head, preferred_element_type=jnp.float32)


PEERS = {"plain JAX, log_softmax": log_softmax, "plain JAX, optax": cross_entropy}


def in_chunks(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " T"],
    rows: int = 1024,
) -> Float[Array, " T"]:
    """A chunk of tokens at a time, its logits computed again in the backward.

    Chunks are `rows` high, or as high as the largest divisor of T below that.
    """
    T, D = hidden.shape
    rows = max(size for size in range(1, min(rows, T) + 1) if T % size == 0)

    @jax.checkpoint
    def chunk(x: tuple[Array, Array]) -> Array:
        return cross_entropy(x[0], head, x[1])

    chunks = hidden.reshape(-1, rows, D), targets.reshape(-1, rows)
    return lax.map(chunk, chunks).reshape(T)


CHUNKED = {"plain JAX, token chunks": in_chunks}
