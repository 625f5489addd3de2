"""What the op returns, and the values that it and its backends hand each other."""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

STATS = ("entropy", "collision", "mean_logit", "top1")


class TokenLogprobs(NamedTuple):
    """Per-token results of `token_logprobs`; a stat that was not asked for is None.

    All are float32 (float64 for float64 inputs) but `top1`. With p = softmax(z):
    """

    logprob: Float[Array, " T"]  # (z[target] - max z) - log(sum(exp(z - max z))), nats
    lse: Float[Array, " T"]  # max z + log(sum(exp(z - max z))), nats
    entropy: Float[Array, " T"] | None = None  # -sum(p log p), nats
    collision: Float[Array, " T"] | None = None  # sum(p ** 2)
    mean_logit: Float[Array, " T"] | None = None  # mean of z over the vocabulary
    top1: Bool[Array, " T"] | None = None  # no logit is larger than the target's


@dataclass(frozen=True, kw_only=True)
class LogitOptions:
    """The static part of z = cap(scale * hidden @ head.T + bias)."""

    softcap: float | None = None
    scale: float = 1.0
    stats: tuple[str, ...] = ()


class Partials(NamedTuple):
    """One entry per (vocabulary block, row); `merge` folds the blocks together.

    With m the block's maximum and e = exp(z - m): a block of which every entry is
    masked has m = -inf and zeros elsewhere. Fields of stats not asked for are None.

    Sums are of differences from m, never of z itself: a common offset of the logits
    then cancels before anything is rounded. (`sum_logit` is for the mean logit, which
    has the offset.)
    """

    max: Float[Array, "blocks T"]
    sum_exp: Float[Array, "blocks T"]  # sum(e)
    target_logit: Float[Array, "blocks T"]  # -inf where the block lacks the target
    sum_exp_diff: Float[Array, "blocks T"] | None = None  # sum(e * (z - m)): entropy
    sum_exp2: Float[Array, "blocks T"] | None = None  # sum(e * e), for the collision
    sum_logit: Float[Array, "blocks T"] | None = None  # sum(z) over unmasked entries
    num_logits: Float[Array, "blocks T"] | None = None  # how many those are


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Kept:
    """Exponentials that the forward keeps, so that the backward need not recompute.

        exp[t, v] = kept_scale * cap'(x[t, v]) * exp(z[t, v] - shift[v // block_v, t])

    for the leading vocabulary entries, with shift the maximum of the block or, where
    that is -inf, 0; 0 where the bias is -inf. Padding rows may hold anything.
    """

    exp: Float[Array, "T keep_v"]  # in the dtype of hidden
    shift: Float[Array, "blocks T"]
    block_v: int = field(metadata={"static": True})  # of every block but the last


def finite_shift(top: jax.Array) -> jax.Array:
    """A maximum to subtract: 0 for that of nothing, as -inf - -inf would be NaN."""
    return jnp.where(top == -jnp.inf, jnp.zeros_like(top), top)


def kept_of(exp: Float[Array, "T keep_v"], partials: Partials, block_v: int) -> Kept:
    """What a forward keeps whose partials are of blocks of `block_v` entries."""
    blocks = -(-exp.shape[1] // block_v)
    return Kept(exp=exp, shift=finite_shift(partials.max[:blocks]), block_v=block_v)


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of logits, sums and results: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def kept_scale(dtype: jnp.dtype) -> float:
    """What `Kept.exp` is multiplied by: small ones would flush to 0 in float16."""
    return 2.0**14 if dtype == jnp.float16 else 1.0


def capped(x: jax.Array, softcap: float | None) -> jax.Array:
    """softcap * tanh(x / softcap), or x itself."""
    return x if softcap is None else softcap * jnp.tanh(x / softcap)
