"""Rotary position embeddings: how a `config.json` describes them, and their tables."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from engine.errors import InputError, shown
from engine.models.values import A_NUMBER, is_positive

logger = logging.getLogger(__name__)

ROPE_TYPES = ("default", "linear", "llama3")
_LEAST_STEP = 1e-3  # between llama3's two factors, of the higher one
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
    if not is_positive(value):
        raise InputError(f"config.json: rope {key}={shown(value)} must be {A_NUMBER}")
    return float(value)


def _parse_section(values: Mapping[str, Any], theta: Any, max_position: int) -> Rope:
    """The rope that `values` describes; `theta` stands in where it names none.

    theta: as it was read, whatever that is.
    """
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
    if high - low < _LEAST_STEP * high:
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


def _without_theta(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section in transformers 5's words, without `rope_theta`."""
    plain = dict(section)
    plain.pop("rope_theta", None)
    old_word = plain.pop("type", "default")
    return {"rope_type": old_word} | plain


def _merge(
    old: Mapping[str, Any] | None,
    new: Mapping[str, Any] | None,
    theta: Any,
    keeps_new_theta: bool,
) -> Mapping[str, Any]:
    """`rope_scaling` and `rope_parameters` as transformers reads a file that has both.

    It takes the first, and with it that one's base frequency; for gemma3 it keeps the
    second's where the first has none.
    """
    if not old or not new:
        return old or new or {}
    if _without_theta(old) != _without_theta(new):
        raise InputError(
            f"config.json: rope_scaling={dict(old)} and rope_parameters={dict(new)} "
            "contradict each other; keep one"
        )
    merged = {**new, **old} if keeps_new_theta else old
    used, other = merged.get("rope_theta", theta), new.get("rope_theta")
    if other is not None and other != used:
        logger.warning(
            "config.json: rope_theta is %s, as transformers reads it; the %s in "
            "rope_parameters is overruled by rope_scaling",
            used,
            other,
        )
    return merged


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
    nested = [
        key
        for key, section in (("rope_scaling", old), ("rope_parameters", new))
        if section and any(kind.endswith("_attention") for kind in section)
    ]
    if nested and not gemma3:
        raise InputError(
            f"config.json: {nested[0]} per layer type is supported for gemma3_text "
            f"only, not for model_type {model_type!r}"
        )
    if "rope_scaling" in nested or (gemma3 and new and not nested):
        raise InputError(
            "config.json: gemma3_text needs rope_parameters keyed by full_attention "
            f"and sliding_attention, and a plain rope_scaling if any, got "
            f"rope_parameters={new} and rope_scaling={old}"
        )
    # null there is an error only where a section has no rope_theta of its own
    theta = values.get("rope_theta", 1e6 if gemma3 else 1e4)
    if not gemma3:
        section = _merge(old, new, theta, keeps_new_theta=False)
        return (_parse_section(section, theta, max_position),) * len(layer_kinds)
    local = values.get("rope_local_base_freq", 1e4)
    full = _section(new or {}, "full_attention")
    full = _merge(old, full, theta, keeps_new_theta=True)
    described = {
        "full_attention": (full, theta),
        "sliding_attention": (_section(new or {}, "sliding_attention") or {}, local),
    }
    ropes = {
        kind: _parse_section(section, base, max_position)
        for kind, (section, base) in described.items()
        if kind in layer_kinds
    }
    return tuple(ropes[kind] for kind in layer_kinds)


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
    ropes: tuple[Rope, ...], head_dim: int, positions: Int[Array, "R S"]
) -> tuple[Float[Array, "kinds R S half"], Float[Array, "kinds R S half"]]:
    """Cosine and sine of every position's angles, float32, one table per rope."""
    frequencies = np.stack([inverse_frequencies(rope, head_dim) for rope in ropes])
    positions = positions.astype(jnp.float32)[None, :, :, None]
    angles = positions * jnp.asarray(frequencies)[:, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "R S N H"],
    cos: Float[Array, "#R S half"],
    sin: Float[Array, "#R S half"],
) -> Float[Array, "R S N H"]:
    """Rotates plane i, which is dims i and i + H/2, in float32; rounds once."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
