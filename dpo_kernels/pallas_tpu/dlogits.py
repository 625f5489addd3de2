"""The gradient of logits on a TPU, from a product that is still on the chip."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dpo_kernels.op.interface import LogitOptions
from dpo_kernels.pallas_tpu.forward import LANES

f32 = jnp.float32


def pack_rows(shift: Array, p_coef: Array, target_grad: Array, targets: Array) -> Array:
    """`RowCoefficients` and the targets' bits in lanes 0 to 3 of each row: [T, 128]."""
    bits = lax.bitcast_convert_type(targets, f32)
    columns = jnp.stack([shift, p_coef, target_grad, bits], axis=1)
    return jnp.pad(columns, ((0, 0), (0, LANES - columns.shape[1])))


class Rows(NamedTuple):
    """What `pack_rows` holds of some rows, each value repeated on all lanes."""

    shift: Float[Array, "t 128"]
    p_coef: Float[Array, "t 128"]
    target_grad: Float[Array, "t 128"]
    # The target's entry less the lane's number: equal to `first`, a constant, where the
    # lane's entry of the group of 128 that starts at `first` is the target.
    target: Int[Array, "t 128"]

    @classmethod
    def of(cls, packed_t: Float[Array, "t 128"], first_v: Any) -> "Rows":
        """Targets count from `first_v` on."""
        shape = packed_t.shape
        shift, p_coef, target_grad, bits = (
            jnp.broadcast_to(packed_t[:, n : n + 1], shape) for n in range(4)
        )
        lane = lax.broadcasted_iota(jnp.int32, shape, 1)
        target = lax.bitcast_convert_type(bits, jnp.int32) - first_v - lane
        return cls(shift, p_coef, target_grad, target)

    def part(self, at_t: slice) -> "Rows":
        """Some of the rows."""
        return Rows(*(x[at_t] for x in self))

    def dlogits(
        self,
        raw_tv: Float[Array, "t 128"],
        bias_v: Any,
        first: int,
        options: LogitOptions,
    ) -> Float[Array, "t 128"]:
        """The gradient of x = scale * raw + bias in float32: `Dlogits`.

        Of a lane each, from the column `first` on.
        """
        x_tv = raw_tv if options.scale == 1 else options.scale * raw_tv
        masked_v = None
        if bias_v is not None:
            masked_v = bias_v == -jnp.inf
            x_tv = x_tv + jnp.where(masked_v, 0.0, bias_v)
        slope_tv, z_tv = None, x_tv
        if options.softcap is not None:
            tanh_tv = jnp.tanh(x_tv / options.softcap)
            slope_tv, z_tv = 1 - tanh_tv * tanh_tv, options.softcap * tanh_tv
        others = self.p_coef * jnp.exp(z_tv - self.shift)
        dx_tv = jnp.where(self.target == first, self.target_grad, others)
        if slope_tv is not None:
            dx_tv = dx_tv * slope_tv
        return dx_tv if masked_v is None else jnp.where(masked_v, 0.0, dx_tv)
