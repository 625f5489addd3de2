"""The one factor that the logits' gradients carry, and gradients are freed of."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


@dataclass(frozen=True, kw_only=True)
class GradientScale:
    """Of z = x_scale * hidden @ head.T + bias: dlogits are dlogits_scale * dL/dz.

    In float16 `dlogits_scale` is a power of two, exact both ways, so that small
    gradients do not flush to 0. Else it is `x_scale`: products with dlogits are then
    gradients themselves, and may be written in the dtype of the head at once.
    """

    x_scale: float
    dlogits_scale: Array | float

    @classmethod
    def of(
        cls, dtype: Any, x_scale: float, dlogprob: Array, dlse: Array
    ) -> "GradientScale":
        """The scale for dlogits of that dtype, of outputs with these cotangents.

        A row's dlogits sum in absolute value to at most 2 * |dlogprob| + |dlse|: scaled
        to 2**10 they stay far from float16's 65504.
        """
        if dtype != jnp.float16:
            return cls(x_scale=x_scale, dlogits_scale=x_scale or 1.0)
        most = jnp.max(2 * jnp.abs(dlogprob) + jnp.abs(dlse))
        exponent = jnp.where(most > 0, 10 - jnp.ceil(jnp.log2(most)), 0.0)
        power = jnp.exp2(jnp.clip(exponent, -100, 100))
        return cls(x_scale=x_scale, dlogits_scale=power)

    def of_product(self, x: Array) -> Array:
        """d hidden or d head, from a product with dlogits."""
        left = self.x_scale / self.dlogits_scale
        return x if isinstance(left, float) and left == 1 else x * left

    def of_sum(self, x: Array) -> Array:
        """d bias, from a sum of dlogits."""
        return x / self.dlogits_scale
