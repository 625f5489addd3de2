"""Rotary position embeddings: how a `config.json` describes them, and their tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from engine.errors import InputError

ROPE_TYPES = ("default", "linear", "llama3")
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor")
_KNOWN_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    *_LLAMA3_KEYS,
}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """One rotary embedding; the fields after `factor` are llama3's alone."""

    rope_type: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise InputError(f"config.json: rope {key}={value!r} must be a number above 0")
    return float(value)


def _one(values: Mapping[str, Any], theta: float, max_position: int) -> Rope:
    """The rope that `values` describes; `theta` stands in where it names none."""
    rope_type = values.get("rope_type", values.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise InputError(
            f"config.json: rope_type {rope_type!r} is not supported; "
            f"allowed: {', '.join(ROPE_TYPES)}"
        )
    unknown = sorted(set(values) - _KNOWN_KEYS)
    if unknown:
        raise InputError(
            f"config.json: rope option {unknown[0]!r} (rope_type {rope_type!r}) is not "
            f"supported; allowed: {', '.join(sorted(_KNOWN_KEYS))}"
        )
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise InputError(
            "config.json: partial_rotary_factor="
            f"{values['partial_rotary_factor']!r} is not supported; only 1 is"
        )
    theta = _number(values, "rope_theta", theta)
    if rope_type == "default":
        return Rope(rope_type=rope_type, theta=theta)
    if rope_type == "linear":
        return Rope(rope_type=rope_type, theta=theta, factor=_number(values, "factor"))
    factor, low, high = (_number(values, key) for key in _LLAMA3_KEYS)
    if low >= high:
        raise InputError(
            f"config.json: llama3 rope needs low_freq_factor < high_freq_factor, "
            f"got {low} and {high}"
        )
    original = _number(values, "original_max_position_embeddings", max_position)
    return Rope(
        rope_type=rope_type,
        theta=theta,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=int(original),
    )


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    section = values.get(key)
    if section is not None and not isinstance(section, Mapping):
        raise InputError(f"config.json: {key}={section!r} must be an object or null")
    return section


def parse_rope(
    values: Mapping[str, Any],
    layer_kinds: tuple[str, ...],
    max_position: int,
    model_type: str,
) -> tuple[Rope, ...]:
    """One rope per entry of `layer_kinds`.

    Reads transformers 4 (`rope_theta`, `rope_scaling`, gemma3's `rope_local_base_freq`)
    and 5 (`rope_parameters`, gemma3's keyed by layer type).
    """
    gemma3 = model_type == "gemma3_text"
    old, new = _section(values, "rope_scaling"), _section(values, "rope_parameters")
    if old and new and dict(old) != dict(new):
        raise InputError(
            f"config.json: rope_scaling={dict(old)} and rope_parameters={dict(new)} "
            "contradict each other; keep one"
        )
    nested = new is not None and any(kind.endswith("_attention") for kind in new)
    if nested and not gemma3:
        raise InputError(
            "config.json: rope_parameters per layer type is supported for gemma3_text "
            f"only, not for model_type {model_type!r}"
        )
    if gemma3 and new and not nested:
        raise InputError(
            "config.json: gemma3_text needs rope_parameters keyed by full_attention "
            f"and sliding_attention, got {dict(new)}"
        )
    theta = _number(values, "rope_theta", 1e6 if gemma3 else 1e4)
    if not gemma3:
        one = _one(new or old or {}, theta, max_position)
        return (one,) * len(layer_kinds)
    local = _number(values, "rope_local_base_freq", 1e4)
    described = {
        "full_attention": (_section(new or {}, "full_attention") or old or {}, theta),
        "sliding_attention": (_section(new or {}, "sliding_attention") or {}, local),
    }
    return tuple(_one(*described[kind], max_position) for kind in layer_kinds)


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each of the `head_dim / 2` planes, float32."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = (1.0 / (np.float32(rope.theta) ** exponent)).astype(np.float32)
    if rope.rope_type == "default":
        return plain
    if rope.rope_type == "linear":
        return (plain / np.float32(rope.factor)).astype(np.float32)
    wavelength = 2 * np.pi / plain
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (rope.original_max_position / wavelength - low) / (high - low)
    smooth = np.clip(smooth, 0.0, 1.0)
    return ((1 - smooth) * plain / rope.factor + smooth * plain).astype(np.float32)


def rope_tables(
    ropes: tuple[Rope, ...], head_dim: int, length: int
) -> tuple[Float[Array, "kinds S half"], Float[Array, "kinds S half"]]:
    """Cosine and sine of every position's angles, float32, one table per rope."""
    frequencies = np.stack([inverse_frequencies(rope, head_dim) for rope in ropes])
    positions = jnp.arange(length, dtype=jnp.float32)
    angles = positions[None, :, None] * jnp.asarray(frequencies)[:, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "R S N H"],
    cos: Float[Array, "S half"],
    sin: Float[Array, "S half"],
) -> Float[Array, "R S N H"]:
    """Rotates plane i, which is dims i and i + H/2, in float32; rounds once."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
