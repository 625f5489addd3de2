"""The optimizer by its name, and the rounding of what it does to parameters."""

import functools
import math
import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax import lax
from jax.extend.random import threefry2x32_p
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from engine.config.dpo import DPOConfig
from engine.models import DecoderConfig
from engine.parallel.sharding import TENSOR
from engine.training.by_layer import by_layer, is_elementwise
from engine.training.matrices import (
    Blocks,
    orthogonalized_momentum,
    parameter_blocks,
    scale_by_adafactor,
)
from engine.training.moments import with_small_moments
from engine.training.schedules import learning_rate_schedule


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer of parameters of any dtype, on each device's shards.

    It computes in float32.
    """

    inner: optax.GradientTransformation
    layered: Blocks | None = None  # where stacks are updated a layer at a time

    def init(self, params: Any) -> optax.OptState:
        """The state before the first step."""
        return self.inner.init(float32_copy(params))

    def update[Params](
        self,
        grads: Any,
        state: optax.OptState,
        params: Params,
        key: Key[Array, ""],
        *,
        factor: Float[Array, ""] | None = None,
        usable: Bool[Array, ""] | None = None,
    ) -> tuple[Params, optax.OptState]:
        """New parameters, and the new state.

        Args:
            key: of the rounding of parameters, of the kind threefry2x32.
            factor: of the gradients.
            usable: where it is false, nothing changes.
        """
        inner = optax.with_extra_args_support(self.inner)

        def moved(old: Any, grads: Any, layer: Array | None) -> Any:
            params, state = old
            if factor is not None:
                grads = jax.tree.map(lambda g: g * factor, grads)
            # For optax, which raises a float to an int.
            with jax.numpy_dtype_promotion("standard"):
                updates, state = inner.update(
                    grads, state, float32_copy(params), layer=layer
                )
            new = add_updates(params, updates, key, layer), state
            if usable is None:
                return new
            # By what is known before: so new and old are never in memory whole.
            return jax.tree.map(functools.partial(jnp.where, usable), new, old)

        if self.layered is None:
            return moved((params, state), grads, None)
        return by_layer(moved, (params, state), grads, self.layered)


def make_optimizer(
    config: DPOConfig, decoder: DecoderConfig, mesh: Mesh, total_steps: int
) -> Optimizer:
    """The optimizer, for use on each device's shards inside `shard_map`.

    It decays matrices and embeddings, not norms or biases, as transformers does. Its
    moments are float32 while it updates them, and are stored as `mu_dtype` and
    `nu_dtype` say.
    """
    blocks = parameter_blocks(decoder, mesh)
    optimizer = _by_name(config, blocks, total_steps)
    kept = config.mu_dtype, config.nu_dtype
    if config.mu_dtype != "8bit" and config.nu_dtype == "float32":
        return Optimizer(inner=optimizer)
    small = with_small_moments(
        optimizer,
        blocks,
        mu=config.mu_dtype,
        nu=config.nu_dtype,
        tensor=mesh.shape[TENSOR],
        seed=config.seed,
    )
    # A code follows from the largest number of a block, so that XLA does not compute
    # moments and codes in one go, as it does moments and what they are in bfloat16.
    layered = "8bit" in kept and is_elementwise(optimizer, blocks, mesh)
    return Optimizer(inner=small, layered=blocks if layered else None)


def _by_name(
    config: DPOConfig, blocks: Blocks, total_steps: int
) -> optax.GradientTransformation:
    """With float32 moments, but for first ones in bfloat16."""
    rate = learning_rate_schedule(config, total_steps)
    decay = config.weight_decay
    decayed = nnx.State(unflatten_dict({path: x.decayed for path, x in blocks.items()}))
    momentum = "bfloat16" if config.mu_dtype == "bfloat16" else None
    adamw = optax.adamw(
        rate,
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=decay,
        mask=decayed,
        mu_dtype=momentum,
    )
    decaying = optax.add_decayed_weights(decay, decayed)
    stepping = optax.scale_by_learning_rate(rate)
    match config.optimizer:
        case "adamw":
            return adamw
        case "lion":
            sign = optax.scale_by_lion(config.lion_beta1, config.lion_beta2, momentum)
            return optax.chain(sign, decaying, stepping)
        case "sgd":
            # PyTorch's: the decay is part of the gradient, so momentum sees it.
            steps = [decaying, stepping]
            if config.sgd_momentum:
                trace = optax.trace(config.sgd_momentum, config.sgd_nesterov, momentum)
                steps.insert(1, trace)
            return optax.chain(*steps)
        case "adafactor":
            return optax.chain(scale_by_adafactor(blocks), decaying, stepping)
        case "muon":
            whole = orthogonalized_momentum(
                blocks,
                beta=config.muon_momentum,
                match_rms=config.muon_match_rms,
                mu_dtype=momentum,
            )
            decaying = optax.add_decayed_weights(decay)
            kinds = {
                path: "muon" if x.orthogonalized else "adamw"
                for path, x in blocks.items()
            }
            return optax.partition(
                {"muon": optax.chain(whole, decaying, stepping), "adamw": adamw},
                nnx.State(unflatten_dict(kinds)),
            )


def float32_copy[Params](params: Params) -> Params:
    """The parameters as the optimizer sees them."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def add_updates[Params](
    params: Params, updates: Any, key: Key[Array, ""], layer: Array | None = None
) -> Params:
    """params + updates, in the dtype of the parameters.

    Where that has fewer digits than float32 the sum is rounded up or down at random, so
    that on average it is exact: rounded to nearest, updates of less than half a unit in
    the last place, which most are at DPO's learning rates, would all be lost. The
    random bits are a function of `key`, the parameter and the device's shard, of which
    `params` may be one `layer`.
    """

    def add(path: Any, x: Array, update: Array) -> Array:
        whole = x.astype(jnp.float32) + update
        if x.dtype == jnp.float32:
            return whole
        name = jax.tree_util.keystr(path)
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        for axis in sorted(jax.typeof(x).manual_axis_type.varying):
            own = jax.random.fold_in(own, lax.axis_index(axis))
        return round_at_random(whole, x.dtype, own, layer)

    return jax.tree_util.tree_map_with_path(add, params, updates)


def round_at_random(
    x: Array, dtype: Any, key: Key[Array, ""], layer: Array | None = None
) -> Array:
    """float32 to bfloat16 or float16, to either neighbour, right on average.

    Values that are not finite, or that fall out of the range, are as a cast gives them.
    With `layer`, x is rounded as that layer of a stack is.
    """
    near = x.astype(dtype)
    back = near.astype(jnp.float32)
    # The neighbour on the other side of x, and how far x is on the way to it.
    other = jnp.where(x > back, jnp.nextafter(near, jnp.array(jnp.inf, dtype)), near)
    other = jnp.where(x < back, jnp.nextafter(near, jnp.array(-jnp.inf, dtype)), other)
    gap = other.astype(jnp.float32) - back
    share = jnp.where(gap == 0, 0.0, (x - back) / jnp.where(gap == 0, 1.0, gap))
    drawn = uniform(key, x.shape, layer)
    chosen = jnp.where(drawn < share, other, near)
    return jnp.where(jnp.isfinite(back) & jnp.isfinite(x), chosen, near)


def uniform(
    key: Key[Array, ""], shape: tuple[int, ...], layer: Int[Array, ""] | None
) -> Float[Array, "..."]:
    """`jax.random.uniform(key, shape)`, or of a stack of those shapes one layer.

    (That is a function of the key, and of the place of a number among all of them: a
    64-bit one, as two of 32 bits.)
    """
    if layer is None:
        return jax.random.uniform(key, shape, jnp.float32)
    size = math.prod(shape)
    if size >= 2**32:
        raise NotImplementedError(f"{size=} of one layer's shard must be below 2**32")
    own, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        own += lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    number = layer.astype(jnp.uint32)  # below 2**16: so no product overflows
    upper = number * jnp.uint32(size >> 16)
    lower = number * jnp.uint32(size & 0xFFFF)
    first = (upper << 16) + lower
    low = own + first
    carried = (first < lower).astype(jnp.uint32) + (low < own).astype(jnp.uint32)
    high = (upper >> 16) + carried
    bits = jnp.bitwise_xor(*threefry2x32_p.bind(*jax.random.key_data(key), high, low))
    # The digits of a number from 1 to 2.
    return lax.bitcast_convert_type(bits >> 9 | jnp.uint32(0x3F800000), jnp.float32) - 1
