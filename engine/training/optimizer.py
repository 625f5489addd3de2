"""The optimizer by its name, and the rounding of what it does to parameters."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array

from engine.config.dpo import DPOConfig
from engine.models import DecoderConfig
from engine.parallel.sharding import TENSOR
from engine.training.matrices import (
    Blocks,
    orthogonalized_momentum,
    parameter_blocks,
    scale_by_adafactor,
)
from engine.training.moments import with_small_moments
from engine.training.schedules import learning_rate_schedule


def make_optimizer(
    config: DPOConfig, decoder: DecoderConfig, mesh: Mesh, total_steps: int
) -> optax.GradientTransformation:
    """The optimizer, for use on each device's shards inside `shard_map`.

    It decays matrices and embeddings, not norms or biases, as transformers does. Its
    gradients and parameters are float32, whatever the dtype of the stored parameters,
    and so are its moments while it updates them; they are stored as `mu_dtype` and
    `nu_dtype` say. Gradients reach it clipped: their global norm needs the mesh, see
    `step.py`.
    """
    blocks = parameter_blocks(decoder, mesh)
    optimizer = _by_name(config, blocks, total_steps)
    if config.mu_dtype != "8bit" and config.nu_dtype == "float32":
        return optimizer
    return with_small_moments(
        optimizer,
        blocks,
        mu=config.mu_dtype,
        nu=config.nu_dtype,
        tensor=mesh.shape[TENSOR],
        seed=config.seed,
    )


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
