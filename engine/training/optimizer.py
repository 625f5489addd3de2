"""AdamW and its learning-rate schedules, with the conventions of transformers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from engine.config.dpo import DPOConfig
from engine.models import DecoderConfig
from engine.parallel.sharding import Role, nest


def learning_rate_schedule(
    config: DPOConfig, total_steps: int
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Learning rate of the update number `step`, counted from 0.

    Warm-up is linear from 0 at step 0 to `learning_rate` at step `warmup_steps`; then
    constant, or falling to 0 at `total_steps` in a line or half a cosine.
    """
    warmup, peak = config.warmup_steps, config.learning_rate

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = step / max(1, warmup)
        done = (step - warmup) / max(1, total_steps - warmup)
        fall = {
            "constant": lambda: jnp.ones_like(step),
            "linear": lambda: jnp.maximum(0.0, 1 - done),
            "cosine": lambda: 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(done, 1.0))),
        }[config.lr_scheduler_type]()
        return peak * jnp.where(step < warmup, rise, fall)

    return schedule


def make_optimizer(
    config: DPOConfig, decoder: DecoderConfig, total_steps: int
) -> optax.GradientTransformation:
    """AdamW; like transformers it decays matrices and embeddings, not norms or biases.

    Gradients reach it clipped: their global norm needs the mesh, see `step.py`.
    """
    decayed = {Role.VOCAB, Role.COLUMN, Role.KV_COLUMN, Role.ROW}
    mask = nnx.State(
        nest({path: p.role in decayed for path, p in decoder.parameters().items()})
    )
    return optax.adamw(
        learning_rate_schedule(config, total_steps),
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        mask=mask,
    )
