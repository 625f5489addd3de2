"""What a tile takes of the workspace, in bytes."""

import jax.numpy as jnp

from dpo_kernels.op.tiling.problem import BackwardTile, Problem, Tile

# Rows of a block when padding rows are to be skipped: small enough to skip most of
# them, large enough to feed the matrix units. Without padding a block is taller.
RAGGED_BLOCK_T = {"cpu": 256, "gpu": 1024, "tpu": 1024}
BLOCK_T = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
# Narrower tiles of logits would slow down `xla`'s forward.
FORWARD_CHUNK_V = {"cpu": 1024, "gpu": 4096, "tpu": 4096}
# XLA for TPU does not fuse kept exponentials with the factors that they need.
KEEPING = ("cpu", "gpu")
# Of the workspace, left free: XLA's own small temporaries.
SPARE_SHARE = 16
# A fused forward writes up to so many float32 numbers for each row and block.
_PARTIALS, _PARTIALS_V = 6, 256


def forward_bytes(problem: Problem, block_t: int) -> tuple[int, int]:
    """Of a tile of `xla.forward_partials`: beside its columns, and of each.

    A column holds the float32 logit and one pass's temporary for each row, and a copy
    of the chunk of the head.
    """
    return 0, 2 * problem.acc_itemsize * block_t + problem.itemsize * problem.D


def backward_bytes(problem: Problem, block_t: int, fused: bool) -> tuple[int, int]:
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


def tail_fits(problem: Problem, tile: BackwardTile, fused: bool) -> bool:
    """Whether the workspace has room for the last chunk, which may be a narrower one.

    It is no part of the loop over the others. Where padding is skipped on a GPU, XLA
    has zeros ready for its gradient of the head, beside all that a chunk takes.
    """
    tail = problem.V % tile.chunk_v
    if not tail or not problem.ragged or problem.platform != "gpu":
        return True
    masked, column = backward_bytes(problem, tile.block_t, fused)
    zeros = problem.itemsize * problem.D
    return masked + (column + zeros) * tail <= problem.workspace_bytes


def writes_dhead_at_once(dtype: jnp.dtype, T: int, block_t: int) -> bool:
    """Whether a chunk of d head is one matmul's result, in the dtype of the head.

    In float16 it would overflow before a power of two is taken out.
    """
    return block_t >= T and dtype != jnp.float16


def kept_bytes(problem: Problem, keep_v: int) -> int:
    """Of the exponentials of `keep_v` entries, from the forward to the backward."""
    return problem.T * keep_v * problem.itemsize


def in_place(problem: Problem, tile: BackwardTile, fused: bool) -> bool:
    """Whether kept exponentials become the logits' gradients where they are.

    All are kept then, in one tile, beside which nothing is held.
    """
    T, V = problem.T, problem.V
    whole = tile.block_t == T and tile.chunk_v == tile.keep_v == V
    at_once = writes_dhead_at_once(problem.dtype, T, tile.block_t)
    keeping = problem.platform in KEEPING and problem.platform == "gpu"
    return whole and fused and at_once and keeping and not problem.ragged


def beside_kept(problem: Problem, tile: Tile, fused: bool) -> int:
    """The most that is held while exponentials are kept: in the backward the tile.

    Before that what the forward holds, which may be more.
    """
    masked, column = backward_bytes(problem, tile.block_t, fused)
    used = masked + column * tile.chunk_v
    if fused:
        # They may be as large as d hidden, which comes after them.
        partials = 4 * _PARTIALS * problem.T * -(-problem.V // _PARTIALS_V)
        used = max(used, partials - problem.acc_itemsize * problem.T * problem.D)
        return used + problem.workspace_bytes // SPARE_SHARE
    block_t = min(problem.T, BLOCK_T[problem.platform])
    _, column = forward_bytes(problem, block_t)
    return max(used, column * min(problem.V, FORWARD_CHUNK_V[problem.platform]))


def workspace_bytes(problem: Problem, tile: BackwardTile, fused: bool) -> int:
    """What the backward takes in all, and the forward that keeps something for it."""
    kept = kept_bytes(problem, tile.keep_v)
    if in_place(problem, tile, fused):
        return kept
    if kept:
        return kept + beside_kept(problem, tile, fused)
    masked, column = backward_bytes(problem, tile.block_t, fused)
    return masked + column * tile.chunk_v
