"""Blocks of the TPU's backward kernel: those that fit and take the least time."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from dpo_kernels.op.tiling import Problem
from dpo_kernels.pallas_tpu.tiling import ROWS, SLICE_V, SPARE, Core, core_of, round_up

# Rows of a piece: a block in which the valid rows end is computed by so many.
PIECE = 256
_PIECEWISE = 1.3  # times as long as in whole blocks; about
PIECE_V = 512  # vocabulary entries of a piece
# Vocabulary entries of a block, or of a step's sums.
_PARTS_V = (256, 512, 1024, 2048, 4096)
_MOST_DEPTH = 4096  # rows that one step sums over
_WIDEST = 4096  # hidden units of a block of a gradient
_LARGEST = 2**22  # elements of such a block: the compiler takes minutes for twice that
# Beside a matmul's own time, as so much more depth: adding a step's product to those
# before it, and of each step's last slice what nothing runs beside. Seen, not derived.
_ADDING, _ENDING = 100, 256
# Bytes a row that XLA needs besides, at most: see `_of_height`.
_BESIDE = 1024
_UNEVEN = 0.1  # of what could all be hidden, as it comes unevenly


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """A block of a product, and how many terms of its sums one step adds."""

    rows: int
    columns: int
    depth: int


@dataclass(frozen=True, kw_only=True)
class TpuBackwardTile:
    """Blocks of the backward kernel's three matmuls."""

    dlogits: Matmul  # rows by vocabulary, over the whole hidden size
    dhidden: Matmul  # rows by hidden size, over the vocabulary
    dhead: Matmul  # vocabulary by hidden size, over the rows
    share_v: int  # vocabulary entries of a core
    chunk_v: int  # those whose dlogits are in memory at once
    hidden_buffers: int  # 2: the next block of rows is fetched while one is used
    cores: int  # of the device
    vmem_bytes: int

    def __post_init__(self) -> None:
        """Refuse blocks that do not fit into each other."""
        for part in (self.dlogits.columns, self.dhidden.depth, self.dhead.rows):
            if self.chunk_v % part or self.share_v % part or part % SLICE_V:
                raise ValueError(f"{part=} must divide {self}, and {SLICE_V} it")
        rows = self.dhead.depth, self.dlogits.rows, self.dhidden.rows
        rows = *rows, min(rows[-1], PIECE), ROWS
        if any(a % b for a, b in itertools.pairwise(rows)):
            raise ValueError(f"each of the rows {rows} must be a multiple of the next")


@dataclass(frozen=True)
class _Option:
    matmul: Matmul
    vmem: int  # bytes of a step: two buffers of what moves, and the compiler's own
    cost: float  # of all steps, in FLOPs of the matrix units' best
    start: int  # bytes that the first step of a chunk waits for


def backward_tile(problem: Problem) -> TpuBackwardTile | None:
    """Blocks of the backward kernel that take the least time.

    None where the workspace does not hold `least_workspace`, or the vector memory no
    rows of the hidden size.
    """
    core = core_of(problem.device)
    if core is None:
        return None
    # Each core has a gradient of hidden of its own, one of which is promised.
    cores = problem.device.num_cores or 1
    if (cores - 1) * 4 * problem.T * problem.D > problem.workspace_bytes // 2:
        cores = 1
    heights = _heights(problem.T, core.most_rows)
    found = [x for h in heights if (x := _of_height(problem, core, cores, h))]
    return min(found, key=lambda x: x[0])[1] if found else None


def least_workspace(problem: Problem) -> int:
    """Bytes that are enough, and hardly more than have to be.

    Those of dlogits of all rows and the narrowest chunk of the vocabulary, and beside.
    """
    T = problem.T
    dlogits = problem.itemsize * SLICE_V * round_up(T, ROWS if T <= PIECE else PIECE)
    return min(-(-dlogits * 16 // 15), dlogits + _BESIDE * T)


def _heights(T: int, most: int) -> Iterator[int]:
    """Rows of a block: all, if they are a piece; else pieces, as many as are whole."""
    if T <= PIECE:
        yield round_up(T, ROWS)
        return
    height = PIECE
    while height <= min(T, most):
        yield height
        height *= 2
    if height // 2 < T // PIECE * PIECE <= most:
        yield T // PIECE * PIECE


def _of_height(
    problem: Problem, core: Core, cores: int, block_t: int
) -> tuple[float, TpuBackwardTile] | None:
    """The fastest with blocks of so many rows, and its cost; None where none fits."""
    T, D, V, size = problem.T, problem.D, problem.V, problem.itemsize
    left = problem.workspace_bytes - (cores - 1) * 4 * T * D
    # What XLA needs besides: it holds `pack_rows` and the row sums of the forward.
    left -= min(left // 16, _BESIDE * T)

    def most_chunk(rows: int) -> int:
        return left // (cores * size * round_up(T, rows))

    found = _matmuls(problem, core, block_t, most_chunk)
    if found is None:
        return None
    buffers, options = found
    dlogits, dhidden, dhead = (x.matmul for x in options)
    step = max(dlogits.columns, dhidden.depth, dhead.rows, SLICE_V)
    most = most_chunk(dhead.depth) // step * step
    if most == 0:
        return None
    share_v = round_up(-(-V // cores), step)
    chunks = -(-share_v // most)
    waits = sum(x.start for x in options) * chunks * cores * core.flops_per_byte
    cost = (sum(x.cost for x in options) + waits) * cores * share_v / V
    return cost, TpuBackwardTile(
        dlogits=dlogits,
        dhidden=dhidden,
        dhead=dhead,
        share_v=share_v,
        chunk_v=round_up(-(-share_v // chunks), step),
        hidden_buffers=buffers,
        cores=cores,
        vmem_bytes=core.vmem_bytes - SPARE,
    )


def _matmuls(
    problem: Problem, core: Core, block_t: int, most_chunk: Callable[[int], int]
) -> tuple[int, list[_Option]] | None:
    """Buffers of hidden, and the fastest blocks of each matmul; None where none fit.

    They are chosen one by one: the buffers of each are gone when the next one starts.
    """
    T, D, V = problem.T, problem.D, problem.V
    limit, most = core.vmem_bytes - 2 * SPARE, most_chunk(block_t)
    parts = [n for n in _PARTS_V if n <= most and (n < 2 * V or n == _PARTS_V[0])]
    widths = sorted({round_up(-(-D // n), SLICE_V) for n in range(1, 65)})
    widths = [n for n in widths if n <= _WIDEST]
    depths = [
        n * block_t
        for n in (1, 2, 4, 8)
        if n == 1 or n * block_t <= min(_MOST_DEPTH, round_up(T, block_t))
    ]
    chunks = -(-V // max(SLICE_V, most))
    dlogits = {
        buffers: _fastest(
            [_dlogits(problem, core, chunks, block_t, n, buffers) for n in parts], limit
        )
        for buffers in ((1, 2) if T > block_t else (1,))
    }
    dhidden = [
        _dhidden(problem, core, chunks, block_t, d, n)
        for d in widths
        for n in parts
        if block_t * d <= _LARGEST
    ]
    dhead = [
        _dhead(problem, core, n, d, t)
        for n in parts
        for d in widths
        for t in depths
        if n <= core.most_rows and n * d <= _LARGEST and most_chunk(t) >= parts[0]
    ]
    others = [x for x in (_fastest(dhidden, limit), _fastest(dhead, limit)) if x]
    able = {n: x for n, x in dlogits.items() if x is not None}
    if len(others) < 2 or not able:
        return None
    buffers = min(able, key=lambda n: able[n].cost)
    return buffers, [able[buffers], *others]


def _padding(problem: Problem, rows: int) -> float:
    """How much longer a matmul takes in blocks of so many rows, where some are padding.

    Of a piece with a valid row all rows are computed, and pieces take longer than whole
    blocks: the mean, of valid rows anywhere from half of all to all.
    """
    if not problem.ragged:
        return 1
    longer = min(rows, PIECE) + (_PIECEWISE - 1) * rows
    return 1 + 2 / 3 * longer / problem.T


def _wholes(size: int, block: int, piece: int) -> float:
    """Of what number of whole blocks the time is that so much takes."""
    whole, rest = divmod(size, block)
    return whole + min(1, _PIECEWISE * round_up(rest, min(piece, block)) / block)


def _fastest(options: Iterable[_Option], limit: int) -> _Option | None:
    fitting = [x for x in options if x.vmem <= limit]
    return min(fitting, key=lambda x: (x.cost, -x.vmem), default=None)


def _option(
    core: Core,
    matmul: Matmul,
    blocks: float,
    steps: float,
    moved: float,
    vmem: int,
    start: int,
) -> _Option:
    """Of so many blocks, in so many steps each that move so many bytes in all."""
    rows, columns, depth = matmul.rows, matmul.columns, matmul.depth
    flops = columns * (depth * (1 + core.weights / rows) + _ADDING)
    flops = (2 * rows * (flops + SLICE_V * _ENDING) + core.step_flops) * steps
    traffic = moved * core.flops_per_byte
    cost = blocks * (max(flops, traffic) + _UNEVEN * min(flops, traffic))
    return _Option(matmul=matmul, vmem=vmem, cost=cost, start=start)


def _dlogits(
    problem: Problem, core: Core, chunks: int, rows: int, columns: int, buffers: int
) -> _Option:
    D, size = problem.D, problem.itemsize
    blocks_t = -(-problem.T // rows)
    blocks = _wholes(problem.T, rows, PIECE) * _wholes(problem.V, columns, PIECE_V)
    moved = columns * (D + rows) * size
    vmem = buffers * rows * D * size + 2 * (moved + 512 * rows)
    slices = 4 * 4 * rows * SLICE_V  # of logits
    vmem += max(slices, rows * D * size if core.keeps_rows else 0)
    matmul = Matmul(rows=rows, columns=columns, depth=D)
    option = _option(core, matmul, blocks, 1, moved, vmem, (rows + columns) * D * size)
    # Nothing runs while the only buffer is filled.
    waits = chunks * (blocks_t - 1) * rows * D * size * core.flops_per_byte
    cost = option.cost + (waits if buffers == 1 else 0)
    return replace(option, cost=cost * _padding(problem, rows))


def _dhidden(
    problem: Problem, core: Core, chunks: int, rows: int, columns: int, depth: int
) -> _Option:
    size, steps = problem.itemsize, _wholes(problem.V, depth, PIECE_V)
    blocks = _wholes(problem.T, rows, PIECE) * -(-problem.D // columns)
    step, block = depth * (rows + columns) * size, rows * columns
    moved = steps * step + chunks * 2 * 4 * block
    vmem = 2 * (step + 2 * 4 * block) + 4 * block  # the product, before it is added
    matmul = Matmul(rows=rows, columns=columns, depth=depth)
    option = _option(core, matmul, blocks, steps, moved, vmem, step + 4 * block)
    return replace(option, cost=option.cost * _padding(problem, rows))


def _dhead(
    problem: Problem, core: Core, rows: int, columns: int, depth: int
) -> _Option:
    size, steps = problem.itemsize, _wholes(problem.T, depth, PIECE)
    blocks = -(-problem.V // rows) * -(-problem.D // columns)
    step, block = depth * (rows + columns) * size, rows * columns
    moved = steps * step + size * block
    vmem = 2 * (step + size * block) + 2 * 4 * block  # the sum, and the product
    vmem += depth * rows * size  # dlogits, transposed
    matmul = Matmul(rows=rows, columns=columns, depth=depth)
    option = _option(core, matmul, blocks, steps, moved, vmem, step)
    return replace(option, cost=option.cost * _padding(problem, depth))
