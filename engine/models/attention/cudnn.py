"""Attention on NVIDIA's GPUs by cuDNN, as JAX calls it.

It knows causality and windows, but nothing of sequences that share a row, and caps no
scores: what asks for these is refused by name (`unsupported`).

Source: `jax.nn.dot_product_attention` of JAX 0.11.
"""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from engine.models.attention import untyped


def attend(
    query: Float[Array, "R S N H"],
    key: Float[Array, "R S K H"],
    value: Float[Array, "R S K H"],
    *,
    scale: float,
    window: int | None = None,
    device: Any = None,
    implementation: str = "cudnn",
) -> Float[Array, "R S N H"]:
    """softmax(scale * q . k) v over all keys of the row up to each query's.

    Scores and softmax are float32; queries, keys, values and what is between the
    products are bfloat16 or float16.

    Args:
        window: how many tokens a query sees, itself included; None: all up to it.
        device: that this is for; None: JAX's default.
        implementation: as JAX's own function takes it.
    """
    kernel = _kernel(scale, window, implementation)
    return untyped.attention(kernel, device, query, key, value)


@functools.cache
def _kernel(scale: float, window: int | None, implementation: Any) -> Any:
    return functools.partial(
        jax.nn.dot_product_attention,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )


def fault() -> str | None:
    """Why JAX cannot call it here; None where it can."""
    try:
        # JAX's own question, which other versions of it may ask elsewhere.
        from jax._src.cudnn import fused_attention_stablehlo

        fused_attention_stablehlo.check_cudnn_version()
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"JAX finds no cuDNN here: {error}"
    return None
