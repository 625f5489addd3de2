"""f-divergences in DPO: what takes the place of the log-ratio in a loss.

With u = log(policy / reference), t = exp(u) and a divergence of generator f, the reward
of the best policy is beta f'(t) up to a constant (Wang et al. 2023, arXiv:2309.16240,
eq. 8 and table 1). The constant is such that the score of u = 0 is 0: it matters where
scores are divided by lengths.

| f_divergence_type | score of u                         |
|-------------------|------------------------------------|
| reverse_kl        | log t = u                          |
| forward_kl        | 1 - 1 / t                          |
| js_divergence     | log(2 t / (1 + t))                 |
| alpha_divergence  | (t^(alpha - 1) - 1) / (alpha - 1)  |
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# exp of more is close to all that float32 can hold: a score stays there, without a
# gradient.
_MAX_EXPONENT = 80.0
# From 1 by less, the alpha-divergence is the reverse KL, which is its limit.
_LIMIT = 1e-6


def score(u: Float[Array, " B"], kind: str, alpha: Any) -> Float[Array, " B"]:
    """The score of log-ratios `u` in nats; `alpha` is alpha_divergence's alone."""
    if kind == "reverse_kl":
        return u
    if kind == "forward_kl":
        return -_expm1(-u)
    if kind == "js_divergence":
        return math.log(2) + jax.nn.log_sigmoid(u)
    assert kind == "alpha_divergence", kind
    power = jnp.asarray(alpha, u.dtype) - 1
    near = jnp.abs(power) < _LIMIT
    power = jnp.where(near, 1.0, power)
    return jnp.where(near, u, _expm1(power * u) / power)


def _expm1(x: Float[Array, " B"]) -> Float[Array, " B"]:
    return jnp.expm1(jnp.minimum(x, _MAX_EXPONENT))
