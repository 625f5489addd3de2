"""Block sizes, in one place: how many rows and vocabulary entries a tile has."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_kernels.op.devices import Device, traced_device

LANES = 128  # on GPU and TPU every chunk but the last is a multiple
LEAST_BLOCK_T = 8  # a small workspace makes blocks of rows no lower than this


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Rows and vocabulary entries of one tile of logits."""

    block_t: int
    chunk_v: int

    def __post_init__(self) -> None:
        """Refuse an empty tile."""
        if self.block_t < 1 or self.chunk_v < 1:
            raise ValueError(f"a tile needs at least one row and column: {self}")


@dataclass(frozen=True, kw_only=True)
class BackwardTile(Tile):
    """Of the shared backward, and what the forward keeps for it."""

    keep_v: int  # leading vocabulary entries: all, or a multiple of `chunk_v`
    heights: tuple[int, ...]  # numbers of leading rows that there is code for, up to T


# Rows of a block when padding rows are to be skipped: small enough to skip most of
# them, large enough to feed the matrix units. Without padding a block is taller.
_RAGGED_BLOCK_T = {"cpu": 256, "gpu": 1024, "tpu": 1024}
_BLOCK_T = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
# With padding a GPU's backward is compiled for at most so many heights of the valid
# rows, which are at least so far apart.
_MOST_HEIGHTS = 8
_LEAST_HEIGHT = 512
# On a CPU a tile of float32 logits should stay in the cache between the matmul and
# the passes over it.
_CPU_TILE_BYTES = 4 * 2**20
_CPU_VECTOR = 32
# FLOPs that a GPU or TPU does in the time of moving a byte; H200: 165, v6e: 560.
_FLOPS_PER_BYTE = 200
# XLA for TPU does not fuse kept exponentials with the factors that they need.
_KEEPING = ("cpu", "gpu")
_LAUNCH_BYTES = 64 * 2**20  # moved in the time that starting a tile's kernels takes
_NARROWEST = 1024  # chunk of the vocabulary that is tried, unless nothing else fits
# Of the workspace, left free: XLA's own small temporaries.
_SPARE_SHARE = 16
# A fused forward writes up to so many float32 numbers for each row and block.
_PARTIALS, _PARTIALS_V = 6, 256
# Narrower tiles of logits would slow down `xla`'s forward.
_FORWARD_CHUNK_V = {"cpu": 1024, "gpu": 4096, "tpu": 4096}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a tile is chosen for."""

    T: int
    D: int
    V: int
    dtype: jnp.dtype  # of hidden and head
    workspace_bytes: int
    device: Device
    ragged: bool  # padding rows are to be skipped

    @property
    def itemsize(self) -> int:
        """Bytes of an element of hidden and head."""
        return self.dtype.itemsize

    @property
    def acc_itemsize(self) -> int:
        """Bytes of a logit, and of an element of a gradient while it is summed."""
        return max(4, self.itemsize)

    @property
    def platform(self) -> str:
        """A row of the tables here: cpu, gpu (of any make) or tpu."""
        platform = self.device.platform
        return "gpu" if platform == "rocm" else platform


def problem_of(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    num_valid: Int[Array, ""] | None,
    workspace_bytes: int,
) -> Problem:
    """The problem that these arguments pose on the device being traced for."""
    return Problem(
        T=hidden.shape[0],
        D=hidden.shape[1],
        V=head.shape[0],
        dtype=hidden.dtype,
        workspace_bytes=workspace_bytes,
        device=traced_device(),
        ragged=num_valid is not None,
    )


def _forward_bytes(problem: Problem, block_t: int) -> tuple[int, int]:
    """Of a tile of `xla.forward_partials`: beside its columns, and of each.

    A column holds the float32 logit and one pass's temporary for each row, and a copy
    of the chunk of the head.
    """
    return 0, 2 * problem.acc_itemsize * block_t + problem.itemsize * problem.D


def _backward_bytes(problem: Problem, block_t: int, fused: bool) -> tuple[int, int]:
    """Of a tile of the shared backward: beside its columns, and of each.

    A column holds its gradient for each row, and the logit unless `fused`; for each
    hidden unit the chunk of the head and of its gradient, and the float32 sum of that
    where it is not one matmul's result. Beside them is `hidden` without its padding.
    """
    per_row = problem.itemsize if fused else problem.itemsize + problem.acc_itemsize
    per_unit = 2 * problem.itemsize
    if not writes_dhead_at_once(problem.dtype, problem.T, block_t):
        per_unit += problem.acc_itemsize
    masked = problem.itemsize * block_t * problem.D if problem.ragged else 0
    return masked, per_row * block_t + per_unit * problem.D


def writes_dhead_at_once(dtype: jnp.dtype, T: int, block_t: int) -> bool:
    """Whether a chunk of d head is one matmul's result, in the dtype of the head.

    In float16 it would overflow before a power of two is taken out.
    """
    return block_t >= T and dtype != jnp.float16


def xla_forward_tile(problem: Problem, keep_v: int = 0) -> Tile:
    """Tile of `xla.forward_partials`, in what the kept exponentials leave."""
    left = problem.workspace_bytes - _kept_bytes(problem, keep_v)
    return _fit(replace(problem, workspace_bytes=left), _forward_bytes)


def backward_tile(problem: Problem, *, fused: bool) -> BackwardTile:
    """Tile of the shared backward; `fused` where the backend holds no tile of logits.

    What is left of the workspace is for exponentials that the forward keeps.
    """

    def bytes_of(problem: Problem, block_t: int) -> tuple[int, int]:
        return _backward_bytes(problem, block_t, fused)

    widest = _fit(problem, bytes_of)
    if problem.platform != "gpu":
        return _with_kept(problem, widest, fused)
    at_once = writes_dhead_at_once(problem.dtype, problem.T, problem.T)
    # In place: the exponentials become the logits' gradients.
    in_place = fused and at_once and not problem.ragged
    in_place &= _kept_bytes(problem, problem.V) <= problem.workspace_bytes
    if in_place and problem.platform in _KEEPING:
        whole = Tile(block_t=problem.T, chunk_v=problem.V)
        return BackwardTile(**vars(whole), keep_v=problem.V, heights=(problem.T,))
    tiles = [_with_kept(problem, widest, fused)]
    block_t = problem.T
    while block_t >= LANES:
        masked, column = bytes_of(problem, block_t)
        most = (problem.workspace_bytes - masked) // column
        for chunks in range(1, -(-problem.V // _NARROWEST) + 1):
            chunk_v = _even_chunk(problem.V, chunks)
            if chunk_v <= most:
                tile = Tile(block_t=block_t, chunk_v=chunk_v)
                tiles.append(_with_kept(problem, tile, fused))
        block_t = -(-block_t // 2)
    return min(tiles, key=lambda tile: _cost(problem, tile))


def _heights(problem: Problem) -> tuple[int, ...]:
    """One; with padding on a GPU a few, of which the least that will do is taken.

    A GPU waits for the host at every turn of a loop whose length is traced.
    """
    T = problem.T
    if not problem.ragged or problem.platform != "gpu":
        return (T,)
    share = -(-T // (_MOST_HEIGHTS * LANES)) * LANES
    step = max(_LEAST_HEIGHT, share)
    return (*range(step, T, step), T)


def _kept_bytes(problem: Problem, keep_v: int) -> int:
    return problem.T * keep_v * problem.itemsize


def _with_kept(problem: Problem, tile: Tile, fused: bool) -> BackwardTile:
    """What fits beside the tile and, before that, beside what the forward holds."""
    masked, column = _backward_bytes(problem, tile.block_t, fused)
    used = masked + column * tile.chunk_v
    if fused:
        # They may be as large as d hidden, which comes after them.
        partials = 4 * _PARTIALS * problem.T * -(-problem.V // _PARTIALS_V)
        used = max(used, partials - problem.acc_itemsize * problem.T * problem.D)
        used += problem.workspace_bytes // _SPARE_SHARE
    else:
        block_t = min(problem.T, _BLOCK_T[problem.platform])
        _, column = _forward_bytes(problem, block_t)
        used = max(used, column * min(problem.V, _FORWARD_CHUNK_V[problem.platform]))
    left = max(0, problem.workspace_bytes - used)
    keep_v = left // _kept_bytes(problem, 1) if problem.platform in _KEEPING else 0
    if keep_v >= problem.V:
        keep_v = problem.V
    else:
        keep_v -= keep_v % tile.chunk_v
    return BackwardTile(**vars(tile), keep_v=keep_v, heights=_heights(problem))


def _cost(problem: Problem, tile: BackwardTile) -> float:
    """What the backward does beside its two matmuls, as bytes moved."""
    T, D, V, acc = problem.T, problem.D, problem.V, problem.acc_itemsize
    chunks, blocks = -(-V // tile.chunk_v), -(-T // tile.block_t)
    recompute = 2 * T * D * (V - tile.keep_v) / _FLOPS_PER_BYTE
    keep = 2 * _kept_bytes(problem, tile.keep_v)
    dhidden = chunks * (2 * acc * T * D + blocks * _LAUNCH_BYTES)
    at_once = writes_dhead_at_once(problem.dtype, T, tile.block_t)
    dhead = 0 if at_once else 2 * acc * blocks * V * D
    return recompute + keep + dhidden + dhead


def _fit(problem: Problem, bytes_of: Callable[[Problem, int], tuple[int, int]]) -> Tile:
    """The widest chunk within the workspace; off the CPU, chunks as even as can be."""
    V, workspace_bytes = problem.V, problem.workspace_bytes
    table = _RAGGED_BLOCK_T if problem.ragged else _BLOCK_T
    block_t = max(1, min(problem.T, table[problem.platform]))
    narrowest = min(V, LANES)

    def least() -> int:
        beside, column = bytes_of(problem, block_t)
        return beside + column * narrowest

    while block_t > LEAST_BLOCK_T and least() > workspace_bytes:
        block_t = -(-block_t // 2)
    if least() > workspace_bytes:
        raise ValueError(
            f"{workspace_bytes=} is too small for a tile of {block_t} rows by "
            f"{narrowest} vocabulary entries at D={problem.D}; give at least {least()}"
        )
    beside, column = bytes_of(problem, block_t)
    most = (workspace_bytes - beside) // column
    if problem.platform == "cpu":
        most = min(most, max(LANES, _CPU_TILE_BYTES // (4 * block_t)))
    if most >= V:
        return Tile(block_t=block_t, chunk_v=max(1, V))
    if problem.platform == "cpu":
        # Odd: rows a power of two apart would compete for the same lines of the cache,
        # which costs a sixth of the time.
        vectors = most // _CPU_VECTOR
        vectors -= vectors % 2 == 0
        return Tile(block_t=block_t, chunk_v=vectors * _CPU_VECTOR)
    chunks = -(-V // (most // LANES * LANES))
    return Tile(block_t=block_t, chunk_v=_even_chunk(V, chunks))


def _even_chunk(V: int, chunks: int) -> int:
    return V if chunks == 1 else -(-V // (chunks * LANES)) * LANES
