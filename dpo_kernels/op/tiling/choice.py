"""The choice of tiles: the fastest of what fits into the workspace."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from dpo_kernels.op.tiling import fits
from dpo_kernels.op.tiling.problem import (
    LANES,
    LEAST_BLOCK_T,
    BackwardTile,
    Problem,
    Tile,
)
from dpo_kernels.op.tiling.time import FUSED_BLOCK, backward_seconds

# With padding a GPU's backward is compiled for at most so many heights of the valid
# rows, which are at least so far apart: each is code of its own, and time to compile.
_MOST_HEIGHTS = 4
_LEAST_HEIGHT = 512
# On a CPU a tile of float32 logits should stay in the cache between the matmul and
# the passes over it.
_CPU_TILE_BYTES = 4 * 2**20
_CPU_VECTOR = 32
# What is tried on a GPU, unless nothing else fits: chunks of the vocabulary from
# `_NARROWEST` on, in few equal parts and of about so many widths, for blocks of rows
# from `_LOWEST` on.
_NARROWEST, _PARTS, _WIDTHS, _LOWEST = 1024, 32, 192, 512


def xla_forward_tile(problem: Problem, keep_v: int = 0) -> Tile:
    """Tile of `xla.forward_partials`, in what the kept exponentials leave."""
    left = problem.workspace_bytes - fits.kept_bytes(problem, keep_v)
    return _widest(replace(problem, workspace_bytes=left), fits.forward_bytes)


def backward_tile(problem: Problem, *, fused: bool) -> BackwardTile:
    """Tile of the shared backward; `fused` where the backend holds no tile of logits.

    What is left of the workspace is for exponentials that the forward keeps. Of equals
    the first is taken.
    """
    candidates = list(backward_candidates(problem, fused))
    if len(candidates) == 1:
        return candidates[0]
    with_room = [x for x in candidates if fits.tail_fits(problem, x, fused)]
    candidates = with_room or candidates
    return min(candidates, key=lambda x: backward_seconds(problem, x, fused=fused))


def backward_candidates(problem: Problem, fused: bool) -> Iterator[BackwardTile]:
    """What fits: one on a CPU or TPU; on a GPU chunks of whole blocks and even ones."""

    def bytes_of(problem: Problem, block_t: int) -> tuple[int, int]:
        return fits.backward_bytes(problem, block_t, fused)

    widest = _widest(problem, bytes_of)
    heights = _heights(problem)
    yield _with_kept(problem, widest, fused, heights)
    if problem.platform != "gpu":
        return
    T, V = problem.T, problem.V
    whole = BackwardTile(block_t=T, chunk_v=V, keep_v=V, heights=heights)
    if fits.in_place(problem, whole, fused):
        if fits.workspace_bytes(problem, whole, fused) <= problem.workspace_bytes:
            yield whole
    for block_t in _blocks_of_rows(T):
        masked, column = bytes_of(problem, block_t)
        most = (problem.workspace_bytes - masked) // column
        for chunk_v in _widths(V, most):
            tile = Tile(block_t=block_t, chunk_v=chunk_v)
            yield _with_kept(problem, tile, fused, heights)


def _blocks_of_rows(T: int) -> list[int]:
    """All rows, and halves of that while they are not too low."""
    blocks = [T]
    while (half := -(-blocks[-1] // 2)) >= _LOWEST:
        blocks.append(half)
    return blocks


def _widths(V: int, most: int) -> list[int]:
    """Chunks up to `most`: the vocabulary in equal parts, and whole blocks of it."""
    fewest = -(-V // max(1, min(most, V)))
    parts = range(fewest, min(fewest + _PARTS, -(-V // _NARROWEST) + 1))
    widths = {_even_chunk(V, n) for n in parts}
    block = FUSED_BLOCK.columns
    step = block * max(1, min(most, V) // (block * _WIDTHS))
    widths.update(range(max(step, _NARROWEST), min(most, V) + 1, step))
    return sorted((width for width in widths if width <= most), reverse=True)


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


def _with_kept(
    problem: Problem, tile: Tile, fused: bool, heights: tuple[int, ...]
) -> BackwardTile:
    """A tile, and as many exponentials as fit beside it."""
    keep_v = 0
    if problem.platform in fits.KEEPING:
        left = problem.workspace_bytes - fits.beside_kept(problem, tile, fused)
        keep_v = min(problem.V, max(0, left) // fits.kept_bytes(problem, 1))
        if keep_v < problem.V:
            keep_v -= keep_v % tile.chunk_v
    return BackwardTile(
        block_t=tile.block_t, chunk_v=tile.chunk_v, keep_v=keep_v, heights=heights
    )


def _widest(
    problem: Problem, bytes_of: Callable[[Problem, int], tuple[int, int]]
) -> Tile:
    """The widest chunk within the workspace; off the CPU, chunks as even as can be."""
    V, workspace_bytes = problem.V, problem.workspace_bytes
    table = fits.RAGGED_BLOCK_T if problem.ragged else fits.BLOCK_T
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
