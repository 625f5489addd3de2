"""What a JAX user writes without this package: full logits, in the two usual spellings.

Logits and softmax are float32 whatever the input dtype, as trainers have them.
"""

import jax
import jax.numpy as jnp
import optax
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
