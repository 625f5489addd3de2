"""The backend for NVIDIA GPUs from Ampere on: Triton kernels through jax-triton.

Reading is fastest where a row of hidden and head is a multiple of 16 bytes (D % 8 == 0
in bfloat16); any other D is right, but slower.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_kernels.op import gpu_tiling, tiling
from dpo_kernels.op.devices import traced_device
from dpo_kernels.op.gpu_tiling import TritonTile
from dpo_kernels.op.interface import Kept, LogitOptions, Partials, kept_of, kept_scale
from dpo_kernels.triton.call import launch, missing_package

fused_dlogits = True
backward = None

_DTYPES = ("bfloat16", "float16", "float32")
# A stat and how many fields of `Partials` it needs, in their order.
_STAT_SLOTS = {"entropy": 1, "collision": 1, "mean_logit": 2}


def unsupported(problem: tiling.Problem) -> str | None:
    """See `Backend.unsupported`."""
    device = problem.device
    if device.platform != "gpu":
        return f"needs an NVIDIA GPU; this is {device}"
    if device.capability is None or device.capability < (8, 0):
        return f"needs a GPU of compute capability 8.0 or newer; this is {device}"
    if problem.dtype.name not in _DTYPES:
        return f"needs {', '.join(_DTYPES)}; this is {problem.dtype.name}"
    return missing_package()


def forward_partials(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " T"],
    bias: Float[Array, " V"] | None,
    num_valid: Int[Array, ""] | None,
    *,
    options: LogitOptions,
    workspace_bytes: int,
    keep_v: int,
) -> tuple[Partials, Kept | None]:
    """See `Backend.forward_partials`; one block per tile of the vocabulary."""
    del workspace_bytes  # nothing is held but the results
    T, V = hidden.shape[0], head.shape[0]
    tile = gpu_tiling.triton_tile(traced_device(), hidden.dtype)
    blocks_t, blocks_v = -(-T // tile.block_t), -(-V // tile.block_v)
    slots = 3 + sum(_STAT_SLOTS.get(stat, 0) for stat in options.stats)
    # Of an argument that is absent the kernel gets another's pointer and reads nothing.
    partials, kept = _launch(
        "partials_kernel",
        (hidden, head, targets, _or(bias, targets), _or(num_valid, targets)),
        (
            jax.ShapeDtypeStruct((slots, blocks_v, T), jnp.float32),
            jax.ShapeDtypeStruct((T, keep_v) if keep_v else (1, 1), hidden.dtype),
        ),
        tile,
        blocks_t * blocks_v,
        dict(
            _constants(hidden, head, bias, options),
            KEEP_V=keep_v,
            KEPT_SCALE=kept_scale(hidden.dtype),
            HAS_NUM_VALID=num_valid is not None,
            ENTROPY="entropy" in options.stats,
            COLLISION="collision" in options.stats,
            MEAN_LOGIT="mean_logit" in options.stats,
        ),
    )
    results = _by_field(partials, options.stats)
    return results, kept_of(kept, results, tile.block_v) if keep_v else None


def dlogits(
    hidden: Float[Array, "T D"],
    head: Float[Array, "chunk D"],
    targets: Int[Array, " T"],
    bias: Float[Array, " chunk"] | None,
    shift: Float[Array, " T"],
    p_coef: Float[Array, " T"],
    target_grad: Float[Array, " T"],
    *,
    options: LogitOptions,
) -> Float[Array, "T chunk"]:
    """See `Dlogits`."""
    T, V = hidden.shape[0], head.shape[0]
    tile = gpu_tiling.triton_tile(traced_device(), hidden.dtype)
    blocks_t, blocks_v = -(-T // tile.block_t), -(-V // tile.block_v)
    (dx,) = _launch(
        "dlogits_kernel",
        (hidden, head, targets, _or(bias, targets), shift, p_coef, target_grad),
        (jax.ShapeDtypeStruct((T, V), hidden.dtype),),
        tile,
        blocks_t * blocks_v,
        _constants(hidden, head, bias, options),
    )
    return dx


def _or(x: Array | None, stand_in: Array) -> Array:
    return stand_in if x is None else x


def _constants(
    hidden: Array, head: Array, bias: Array | None, options: LogitOptions
) -> dict[str, Any]:
    """What both kernels are compiled for, besides the tile."""
    return {
        "T": hidden.shape[0],
        "V": head.shape[0],
        "D": hidden.shape[1],
        "SCALE": options.scale,
        "SOFTCAP": options.softcap,
        "HAS_BIAS": bias is not None,
        "PRECISION": "tf32x3" if hidden.dtype == jnp.float32 else "tf32",
    }


def _by_field(slots: Array, stats: tuple[str, ...]) -> Partials:
    """The stacked results under their names."""
    rest = iter(slots[3:])
    count = {s: n for s, n in _STAT_SLOTS.items() if s in stats}
    taken = {s: [next(rest) for _ in range(n)] for s, n in count.items()}
    sum_logit, num_logits = taken.get("mean_logit", (None, None))
    return Partials(
        max=slots[0],
        sum_exp=slots[1],
        target_logit=slots[2],
        sum_exp_diff=taken.get("entropy", (None,))[0],
        sum_exp2=taken.get("collision", (None,))[0],
        sum_logit=sum_logit,
        num_logits=num_logits,
    )


def _launch(
    kernel: str,
    arrays: tuple[Array, ...],
    out: tuple[jax.ShapeDtypeStruct, ...],
    tile: TritonTile,
    programs: int,
    constants: dict[str, Any],
) -> tuple[Array, ...]:
    """Run a kernel of `triton_kernels`: inputs, then outputs, then constants."""
    from dpo_kernels.triton import kernels as triton_kernels

    return launch(
        getattr(triton_kernels, kernel),
        arrays,
        out,
        programs,
        name=f"token_logprobs_{kernel}",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        BLOCK_T=tile.block_t,
        BLOCK_V=tile.block_v,
        BLOCK_D=tile.block_d,
        GROUP_T=tile.group_t,
        **constants,
    )
