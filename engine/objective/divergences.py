"""f-divergences in DPO: what takes the place of the log-ratio in a loss.

With u = log(policy / reference), t = exp(u) and a divergence of generator f, the reward
of the best policy is beta f'(t) up to a constant (Wang et al. 2023, arXiv:2309.16240,
eq. 8 and table 1). A constant is the same for both completions and is left out.

| f_divergence_type | f'(t)                       | score of u               |
|-------------------|-----------------------------|--------------------------|
| reverse_kl        | log t + 1                   | u                        |
| forward_kl        | -1 / t                      | -exp(-u)                 |
| js_divergence     | log(2 t / (1 + t))          | log sigmoid(u)           |
| alpha_divergence  | (t^(a - 1) - 1) / (a - 1)   | exp((a - 1) u) / (a - 1) |
"""

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
        return -_exp(-u)
    if kind == "js_divergence":
        return jax.nn.log_sigmoid(u)
    assert kind == "alpha_divergence", kind
    power = jnp.asarray(alpha, u.dtype) - 1
    near = jnp.abs(power) < _LIMIT
    power = jnp.where(near, 1.0, power)
    return jnp.where(near, u, _exp(power * u) / power)


def _exp(x: Float[Array, " B"]) -> Float[Array, " B"]:
    return jnp.exp(jnp.minimum(x, _MAX_EXPONENT))
