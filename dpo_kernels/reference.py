"""Plain jax.numpy with full logits, in any dtype up to float64: the truth.

In float64 (under x64) this is the truth of every test; in a narrower dtype it is what a
JAX user would write, and its error is the bound for the kernels' errors.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_kernels.op.interface import TokenLogprobs, accumulator, capped


def token_logprobs(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " T"],
    *,
    num_valid: Int[Array, ""] | int | None = None,
    bias: Float[Array, " V"] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    stats: tuple[str, ...] = (),
) -> TokenLogprobs:
    """As `dpo_kernels.token_logprobs`, on one device, with the [T, V] logits in memory.

    Differentiate it with `jax.grad`: it has no gradient of its own.
    """
    acc = accumulator(hidden.dtype)
    valid_T = jnp.ones(targets.shape, bool)
    if num_valid is not None:
        count = jnp.asarray(num_valid, jnp.int32)
        valid_T = jnp.arange(targets.shape[0], dtype=jnp.int32) < count
        # Zeroed before use, not only after: a NaN in a padding row would otherwise
        # come back as 0 * NaN in the gradient of the head.
        hidden = jnp.where(valid_T[:, None], hidden, jnp.zeros_like(hidden))
    x_TV = scale * jnp.einsum("TD,VD->TV", hidden, head, preferred_element_type=acc)
    exists_V = jnp.ones(head.shape[0], bool)
    if bias is not None:
        exists_V = bias != -jnp.inf
        x_TV = x_TV + jnp.where(exists_V, bias, jnp.zeros_like(bias)).astype(acc)[None]
    # The cap comes before the mask: capped, a masked -inf would be a finite -softcap.
    z_TV = jnp.where(exists_V[None], capped(x_TV, softcap), -jnp.inf)
    lse_T = jax.nn.logsumexp(z_TV, axis=-1)
    # Not through the lse: a float32 near 1e8 is a multiple of 8.
    log_p_TV = jax.nn.log_softmax(z_TV, axis=-1)
    in_vocab_T = (targets >= 0) & (targets < head.shape[0])
    safe_targets_T = jnp.where(in_vocab_T, targets, 0)

    def at_target(x_TV: jax.Array) -> jax.Array:
        x_T = jnp.take_along_axis(x_TV, safe_targets_T[:, None], axis=-1)[:, 0]
        return jnp.where(in_vocab_T, x_T, -jnp.inf)

    target_z_T = at_target(z_TV)
    # log_softmax of a row in which nothing exists is NaN.
    logprob_T = jnp.where(target_z_T == -jnp.inf, -jnp.inf, at_target(log_p_TV))

    def rows(values: jax.Array) -> jax.Array:
        return jnp.where(valid_T, values, jnp.zeros_like(values))

    return TokenLogprobs(
        logprob=rows(logprob_T),
        lse=rows(lse_T),
        **_stats(jax.lax.stop_gradient(z_TV), exists_V, target_z_T, stats, rows),
    )


def _stats(z_TV, exists_V, target_z_T, stats, rows) -> dict[str, jax.Array]:
    p_TV = jax.nn.softmax(z_TV, axis=-1)
    finite_z_TV = jnp.where(exists_V[None], z_TV, jnp.zeros_like(z_TV))
    compute = {
        "entropy": lambda: (
            -jnp.sum(
                p_TV * jnp.where(exists_V[None], jax.nn.log_softmax(z_TV), 0), axis=-1
            )
        ),
        "collision": lambda: jnp.sum(p_TV**2, axis=-1),
        "mean_logit": lambda: finite_z_TV.sum(-1) / exists_V.sum().astype(z_TV.dtype),
        "top1": lambda: target_z_T >= z_TV.max(axis=-1),
    }
    return {name: rows(compute[name]()) for name in stats}


def sequence_sums(
    values: Float[Array, " T"],
    segment_ids: Int[Array, " T"],
    num_segments: int,
    *,
    weights: Float[Array, " T"] | None = None,
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """As `dpo_kernels.sequence_sums`, by a [R, T] one-hot matrix."""
    acc = accumulator(values.dtype)
    values = values.astype(acc)
    member_RT = segment_ids[None] == jnp.arange(num_segments)[:, None]
    weights_T = jnp.ones_like(values) if weights is None else weights.astype(acc)
    weights_RT = jnp.where(member_RT, weights_T[None], jnp.zeros_like(weights_T)[None])
    values_RT = jnp.where(weights_RT != 0, values[None], jnp.zeros_like(values)[None])
    counts_R = (weights_RT != 0).sum(axis=-1).astype(acc)
    return (weights_RT * values_RT).sum(axis=-1), counts_R
