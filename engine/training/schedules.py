"""Learning rates by step, with the values of transformers' schedules."""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from engine.config.dpo import DPOConfig
from engine.config.fields import COUNT_LIMIT
from engine.errors import InputError

Factor = Callable[[Array], Array]  # of learning_rate, by float32 step


def learning_rate_schedule(config: DPOConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of the update number `step`, counted from 0; float32.

    Warm-up is linear from 0 at step 0 to `learning_rate` at its last step, unless the
    schedule has a warm-up of its own; what comes after is the schedule's.
    """
    warmup, peak = config.warmup(total_steps), config.learning_rate
    kind = config.lr_scheduler_type
    if kind in ("warmup_stable_decay", "wsd"):
        rise, after = _warmup_stable_decay(config, warmup, total_steps)
    else:
        rise, after = _line, _AFTER[kind](config, warmup, total_steps)

    def schedule(step: Any) -> Array:
        at = jnp.asarray(step, jnp.float32)
        factor = after(at)
        if warmup:
            factor = jnp.where(at < warmup, rise(at / warmup), factor)
        return jnp.float32(peak) * factor

    return schedule


def check_schedule(config: DPOConfig, total_steps: int) -> None:
    """Refuse a warm-up that never ends, and a decay that begins before it.

    More steps than JAX counts are refused as well.

    Raises:
        InputError: with the number of steps that there are.
    """
    if total_steps >= COUNT_LIMIT:
        raise InputError(
            f"num_train_epochs={config.num_train_epochs} makes {total_steps} steps, "
            f"which must be below {COUNT_LIMIT}; lower it or set max_training_steps"
        )
    warmup, options = config.warmup(total_steps), config.schedule_options
    if warmup and warmup >= total_steps:
        ratio = config.warmup_ratio
        given = f"warmup_ratio={ratio} ({warmup} steps)" if ratio else ""
        raise InputError(
            f"{given or f'warmup_steps={warmup}'} must be less than the run's "
            f"{total_steps} steps, or learning_rate is never reached; lower it"
        )
    if options.num_decay_steps is not None and options.num_stable_steps is None:
        if warmup + options.num_decay_steps > total_steps:
            raise InputError(
                f"lr_scheduler_kwargs.num_decay_steps={options.num_decay_steps} and "
                f"{warmup} steps of warm-up are more than the run's {total_steps} "
                "steps; lower one"
            )


def _line(share: Array) -> Array:
    return share


def _one(step: Array) -> Array:
    return jnp.ones_like(step)


def _constant(config: DPOConfig, warmup: int, total: int) -> Factor:
    del config, warmup, total
    return _one


def _progress(warmup: int, total: int) -> Factor:
    """The share that is done of the steps after warm-up."""
    return lambda step: (step - warmup) / max(1, total - warmup)


def _linear(config: DPOConfig, warmup: int, total: int) -> Factor:
    del config
    return lambda step: jnp.maximum(0.0, (total - step) / max(1, total - warmup))


def _wave(share: Array, cycles: float) -> Array:
    """Down and up again in each cycle, within 0 and 1."""
    return 0.5 * (1.0 + jnp.cos(math.pi * 2.0 * cycles * share))


def _cosine(config: DPOConfig, warmup: int, total: int) -> Factor:
    options, share = config.schedule_options, _progress(warmup, total)
    cycles = 0.5 if options.num_cycles is None else options.num_cycles
    low = options.min_lr_rate or 0.0
    if options.min_lr is not None and config.learning_rate:
        low = options.min_lr / config.learning_rate
    return lambda step: _wave(share(step), cycles) * (1.0 - low) + low


def _restarts(config: DPOConfig, warmup: int, total: int) -> Factor:
    share, cycles = _progress(warmup, total), config.schedule_options.num_cycles or 1.0
    return lambda step: jnp.where(
        share(step) >= 1.0, 0.0, _wave((cycles * share(step)) % 1.0, 0.5)
    )


def _polynomial(config: DPOConfig, warmup: int, total: int) -> Factor:
    options, share = config.schedule_options, _progress(warmup, total)
    power = 1.0 if options.power is None else options.power
    end = 1e-7 if options.lr_end is None else options.lr_end
    low = end / config.learning_rate
    # Held within [0, 1]: warm-up's steps are not, and a power of less than 0 is NaN.
    return lambda step: (1.0 - low) * jnp.clip(1.0 - share(step), 0, 1) ** power + low


def _inverse_sqrt(config: DPOConfig, warmup: int, total: int) -> Factor:
    del total
    scale = config.schedule_options.timescale or warmup or 10_000
    # Warm-up's steps, which are not asked for, may lie before the root's beginning.
    return lambda step: (
        1.0 / jnp.sqrt((jnp.maximum(step, warmup) + (scale - warmup)) / scale)
    )


_AFTER: dict[str, Callable[[DPOConfig, int, int], Factor]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_min_lr": _cosine,
    "cosine_with_restarts": _restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
}


def _warmup_stable_decay(
    config: DPOConfig, warmup: int, total: int
) -> tuple[Factor, Factor]:
    """How the rate rises by the share of warm-up, and all that comes after."""
    options = config.schedule_options
    decay, low = options.num_decay_steps or 1, options.min_lr_ratio or 0.0
    stable = options.num_stable_steps
    stable = total - warmup - decay if stable is None else stable
    cycles = 0.5 if options.num_cycles is None else options.num_cycles
    rises: dict[str, Factor] = {
        "linear": _line,
        "cosine": lambda share: 0.5 * (1.0 - jnp.cos(math.pi * share)),
        "1-sqrt": lambda share: 1.0 - jnp.sqrt(jnp.maximum(0.0, 1.0 - share)),
    }
    falls: dict[str, Factor] = {
        "linear": lambda share: 1.0 - share,
        "cosine": lambda share: _wave(share, cycles),
        "1-sqrt": lambda share: 1.0 - jnp.sqrt(share),
    }
    rise, fall = (
        rises[options.warmup_type or "linear"],
        falls[options.decay_type or "cosine"],
    )

    def after(step: Array) -> Array:
        share = jnp.clip((step - warmup - stable) / decay, 0, 1)
        falling = jnp.where(share < 1, fall(share) * (1.0 - low) + low, low)
        return jnp.where(step < warmup + stable, 1.0, falling)

    return lambda share: rise(share) * (1.0 - low) + low, after
