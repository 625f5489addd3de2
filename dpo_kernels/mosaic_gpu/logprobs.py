"""The backend for NVIDIA's Hopper: warp-specialised kernels in Pallas Mosaic GPU."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_kernels.op.devices import Device, pretended, traced_device
from dpo_kernels.op.gpu_tiling import MosaicTile, mosaic_tile
from dpo_kernels.op.interface import Kept, LogitOptions, Partials, kept_of
from dpo_kernels.op.loops import make_varying, valid_rows, varying_axes
from dpo_kernels.op.tiling import Problem, problem_of

fused_dlogits = True
backward = None


@contextlib.contextmanager
def interpreted(num_cores: int = 4, **options: Any) -> Iterator[None]:
    """Run the kernels in Pallas's interpreter, on any machine; slow, for tests.

    Args:
        num_cores: how many streaming multiprocessors the imagined GPU has.
        options: of `jax.experimental.pallas.mosaic_gpu.InterpretGPUParams`.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    hopper = Device(
        platform="gpu", kind="NVIDIA H200", num_cores=num_cores, capability=(9, 0)
    )
    interpreter = plgpu.InterpretGPUParams(**options)
    with pretended(hopper), plgpu.force_gpu_interpret_mode(interpreter):
        yield


def unsupported(problem: Problem) -> str | None:
    """See `Backend.unsupported`."""
    device = problem.device
    if device.platform != "gpu" or device.capability is None:
        return f"needs an NVIDIA GPU of compute capability 9.0; this is {device}"
    if device.capability[0] != 9:
        return (
            "needs Hopper's tensor cores (compute capability 9.0, as the H100 and H200 "
            f"have); this is {device}"
        )
    if problem.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16 inputs; these are {problem.dtype}"
    if problem.D % 64:
        return f"needs a hidden size that 64 divides; this is D={problem.D}"
    if problem.V % 8:
        return f"needs a vocabulary (slice) that 8 divides; this is V={problem.V}"
    return None


def _num_cores() -> int:
    cores = traced_device().num_cores
    assert cores is not None, "a GPU has a number of cores"
    return cores


def _pad(x: Array, size: int, value: float) -> Array:
    """The first axis lengthened to `size`; `x` itself where it has it already."""
    widths = [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return x if size == x.shape[0] else jnp.pad(x, widths, constant_values=value)


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _whole_tiles(hidden: Array, bias: Array | None, V: int, tile: MosaicTile):
    """Hidden with a multiple of eight rows, bias of whole tiles, and padded T."""
    T = hidden.shape[0]
    if bias is not None:
        padded = bias.astype(jnp.float32)
        bias = _pad(padded, _round_up(V, tile.block_v), -jnp.inf)
    return (
        _pad(hidden, _round_up(T, 8), 0),
        bias,
        _round_up(T, tile.cluster * tile.block_t),
    )


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
    """See `Backend.forward_partials`; takes no workspace."""
    from dpo_kernels.mosaic_gpu import kernels as mosaic_gpu_kernels

    T, V = hidden.shape[0], head.shape[0]
    axes = varying_axes(hidden, head, targets, bias, num_valid)
    tile = mosaic_tile(problem_of(hidden, head, num_valid, workspace_bytes))
    hidden, padded_bias, padded_T = _whole_tiles(hidden, bias, V, tile)
    partials, kept = mosaic_gpu_kernels.forward(
        hidden,
        head,
        _pad(targets, padded_T, -1),
        padded_bias,
        valid_rows(num_valid, T),
        options=options,
        keep_v=_round_up(keep_v, 16),
        tile=tile,
        num_cores=_num_cores(),
    )
    partials = jax.tree.map(lambda x: make_varying(x[:, :T], axes), partials)
    if "mean_logit" in options.stats:
        partials = partials._replace(num_logits=_count(bias, V, tile, partials.max))
    if kept is None:
        return partials, None
    exp = make_varying(kept[:T, :keep_v], axes)
    return partials, kept_of(exp, partials, tile.block_v)


def _count(bias: Array | None, V: int, tile: MosaicTile, like: Array) -> Array:
    """How many entries of each block exist, for every row."""
    exists_v = jnp.ones((V,), bool) if bias is None else bias != -jnp.inf
    padded = _pad(exists_v, like.shape[0] * tile.block_v, False)
    count = padded.reshape(like.shape[0], tile.block_v).sum(axis=1)
    count = jnp.broadcast_to(count.astype(like.dtype)[:, None], like.shape)
    return make_varying(count, varying_axes(like))


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
    """See `Dlogits`.

    A scale without bias and soft-cap is part of exp2's factor, and shift is divided by
    it: p is then off by what rounds shift / scale, relatively by |shift| * 2**-23 at
    most. It is as much as plain JAX loses when it rounds a scaled logit.
    """
    from dpo_kernels.mosaic_gpu import kernels as mosaic_gpu_kernels

    T, chunk = hidden.shape[0], head.shape[0]
    rows = (targets, shift, p_coef, target_grad)
    axes = varying_axes(hidden, head, bias, *rows)
    tile = mosaic_tile(problem_of(hidden, head, None, 0))
    hidden, bias, padded_T = _whole_tiles(hidden, bias, chunk, tile)
    fills = mosaic_gpu_kernels.ROW_FILLS
    dx = mosaic_gpu_kernels.dlogits(
        hidden,
        head,
        [_pad(x, padded_T, fill) for x, fill in zip(rows, fills, strict=True)],
        bias,
        valid_rows(None, T),
        options=options,
        tile=tile,
        num_cores=_num_cores(),
    )
    return make_varying(dx[:T, :chunk], axes)
