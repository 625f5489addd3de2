"""AdamW and its learning-rate schedules, with the conventions of transformers."""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax import lax
from jaxtyping import Array

from engine.config.dpo import DPOConfig
from engine.models import DecoderConfig
from engine.parallel.sharding import Role


def learning_rate_schedule(config: DPOConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of the update number `step`, counted from 0.

    Warm-up is linear from 0 at step 0 to `learning_rate` at step `warmup_steps`; then
    constant, or falling to 0 at `total_steps` in a line or half a cosine.
    """
    warmup, peak = config.warmup_steps, config.learning_rate
    rest = max(1, total_steps - warmup)
    after = {
        "constant": functools.partial(optax.constant_schedule, peak),
        "linear": functools.partial(optax.linear_schedule, peak, 0.0, rest),
        "cosine": functools.partial(optax.cosine_decay_schedule, peak, rest),
    }[config.lr_scheduler_type]()
    if not warmup:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup), after], [warmup]
    )


def make_optimizer(
    config: DPOConfig, decoder: DecoderConfig, total_steps: int
) -> optax.GradientTransformation:
    """AdamW; like transformers it decays matrices and embeddings, not norms or biases.

    Its gradients and parameters are float32, and so is its state, whatever the dtype of
    the stored parameters: in bfloat16 the decay of the second moment by 0.999 rounds to
    none. Gradients reach it clipped: their global norm needs the mesh, see `step.py`.
    """
    decayed = {Role.VOCAB, Role.COLUMN, Role.KV_COLUMN, Role.ROW}
    trained = {
        path: param.role in decayed
        for path, param in decoder.parameters().items()
        if param.trainable
    }
    mask = nnx.State(unflatten_dict(trained))
    return optax.adamw(
        learning_rate_schedule(config, total_steps),
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        mask=mask,
    )


def float32_copy[Params](params: Params) -> Params:
    """The parameters as the optimizer sees them."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def add_updates[Params](params: Params, updates: Any, key: Array) -> Params:
    """params + updates, in the dtype of the parameters.

    Where that has fewer digits than float32 the sum is rounded up or down at random, so
    that on average it is exact: rounded to nearest, updates of less than half a unit in
    the last place, which most are at DPO's learning rates, would all be lost. The
    random bits are a function of `key`, the parameter and the device's shard.
    """

    def add(path: Any, x: Array, update: Array) -> Array:
        whole = x.astype(jnp.float32) + update
        if x.dtype == jnp.float32:
            return whole
        name = jax.tree_util.keystr(path)
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        for axis in sorted(jax.typeof(x).manual_axis_type.varying):
            own = jax.random.fold_in(own, lax.axis_index(axis))
        return round_at_random(whole, x.dtype, own)

    return jax.tree_util.tree_map_with_path(add, params, updates)


def round_at_random(x: Array, dtype: Any, key: Array) -> Array:
    """float32 to bfloat16 or float16, to either neighbour, right on average.

    Values that are not finite, or that fall out of the range, are as a cast gives them.
    """
    near = x.astype(dtype)
    back = near.astype(jnp.float32)
    # The neighbour on the other side of x, and how far x is on the way to it.
    other = jnp.where(x > back, jnp.nextafter(near, jnp.array(jnp.inf, dtype)), near)
    other = jnp.where(x < back, jnp.nextafter(near, jnp.array(-jnp.inf, dtype)), other)
    gap = other.astype(jnp.float32) - back
    share = jnp.where(gap == 0, 0.0, (x - back) / jnp.where(gap == 0, 1.0, gap))
    drawn = jax.random.uniform(key, x.shape, jnp.float32)
    chosen = jnp.where(drawn < share, other, near)
    return jnp.where(jnp.isfinite(back) & jnp.isfinite(x), chosen, near)
