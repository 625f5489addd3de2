"""Before the first step: the device's fast attention gives what plain JAX gives here.

Kernels of other libraries are told who sees whom, and peers' worst faults are those
where one of them did not listen: losses are wrong then, and nothing else is. So a row
of some sequences, as the run has them, goes through both, with gradients.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from engine.config.dpo import DPOConfig
from engine.errors import InputError
from engine.models import DecoderConfig, attention
from engine.parallel.batch import Arrangement, KeySpans

logger = logging.getLogger(__name__)

_LENGTH = 640  # of the row: more than one block of any kernel
_WINDOW = 100  # at most, so that something is out of sight
# What groups of sequences share, and what is each one's own.
_SHARED = ((70, 90, 41), (128, 32, 160), (33, 7, 48))
_PACKED = ((0, 161), (0, 128), (0, 192), (0, 7), (0, 1), (0, 120))
_ONE = ((300, 200, 139),)  # with a shared beginning a row has one pair
_ALLOWED = 8  # times the error of plain JAX in the same dtype
_NAMES = "its values", "d query", "d key", "d value"


def check_attention(
    config: DecoderConfig, arguments: DPOConfig, dtype: Any, mesh: Mesh
) -> None:
    """Compare on one of this process's devices; nothing where attention is plain JAX.

    Raises:
        InputError: they differ by more than rounding explains, and in what.
    """
    case = attention.Case.of(mesh, arguments.arrangement, dtype, config)
    name = attention.choose(arguments.attention, case)
    if name == "tiles":
        return
    device = mesh.local_devices[0]
    worst = compare(name, config, arguments.arrangement, dtype, device)
    logger.info(
        "start check: attention by %s gives on this device what plain JAX does (off by "
        "%.2g of what rounding explains)",
        name,
        worst,
    )


def compare(
    name: str, config: DecoderConfig, arrangement: Arrangement, dtype: Any, device: Any
) -> float:
    """The largest difference to plain JAX's, in what rounding explains of it.

    Raises:
        InputError: it is above 1.
    """
    group = config.num_heads // config.num_kv_heads
    rng = np.random.default_rng(0)
    shapes = [(1, _LENGTH, heads, config.head_dim) for heads in (group, 1, 1, group)]
    arrays = [
        jax.device_put(jnp.asarray(rng.standard_normal(shape), dtype), device)
        for shape in shapes
    ]
    worst = 0.0
    for which, window in enumerate(config.windows):
        run = functools.partial(_run, config, arrangement, device, which)
        exact = run("tiles", [x.astype(jnp.float32) for x in arrays])
        plain, found = run("tiles", arrays), run(name, arrays)
        for what, truth, ours, theirs in zip(_NAMES, exact, plain, found, strict=True):
            size = np.abs(truth).max()
            rounding = max(np.abs(ours - truth).max() / size, jnp.finfo(dtype).eps)
            off = np.abs(theirs - truth).max() / size
            worst = max(worst, float(off / (_ALLOWED * rounding)))
            if not off <= _ALLOWED * rounding:
                rows = "packed" if arrangement.packing else "unpacked"
                shared = " with shared beginnings" * arrangement.share_prompt
                raise InputError(
                    f"attention={name!r} is not what plain JAX gives on this device: "
                    f"{what} in {rows} rows{shared}, window {window}, is off by "
                    f"{off:.2g} of the largest, and rounding explains "
                    f"{_ALLOWED * rounding:.2g}; train with attention=tiles, and "
                    "please report it with the versions of jax and its plugins"
                )
    return worst


def _run(
    config: DecoderConfig,
    arrangement: Arrangement,
    device: Any,
    which: int,
    name: str,
    arrays: list[Array],
) -> list[np.ndarray]:
    """Attention's result and three gradients, in float32."""
    windows = [x if x is None else min(x, _WINDOW) for x in config.windows]

    @jax.jit
    def with_gradients(query: Array, key: Array, value: Array, dout: Array) -> Any:
        def attend(query: Array, key: Array, value: Array) -> Array:
            return attention.attend(
                name,
                query,
                key,
                value,
                scale=config.query_scale,
                softcap=config.attn_softcap,
                windows=windows,
                which=jnp.int32(which),
                spans=attention.laid_out(name, spans_of(arrangement), arrangement),
                longest=None,
                device=device,
            )

        out, pullback = jax.vjp(attend, query, key, value)
        return out, *pullback(dout)

    found = with_gradients(*arrays)
    return [np.asarray(x.astype(jnp.float32)) for x in found]


def spans_of(arrangement: Arrangement) -> KeySpans | None:
    """What the tokens of the row see; the last ones pad it."""
    if not arrangement.with_spans:
        return None
    groups = _PACKED
    if arrangement.share_prompt:
        groups = _SHARED if arrangement.packing else _ONE
    return KeySpans.of_groups(groups, _LENGTH)
