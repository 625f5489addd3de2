"""What the shared backward costs on a GPU, in seconds: a model, not a measurement.

A product is cut into blocks of its result, and multiprocessors take a block each at a
time: of T, D, V and a chunk c of the vocabulary

    dlogits [T, c] of depth D,  d hidden [T, D] of depth c,  d head [c, D] of depth T.

A wave is as many blocks as there is room for at once. The last wave of a product costs
as much as a full one: a product that fills 7.1 of them takes 8, and is 0.89 efficient.
"""

from dataclasses import dataclass
from typing import NamedTuple

from dpo_kernels.op.devices import gpu_speed
from dpo_kernels.op.tiling.fits import kept_bytes, writes_dhead_at_once
from dpo_kernels.op.tiling.problem import BackwardTile, Problem

LAUNCH_S = 14e-6  # of starting a tile's kernels, and of what they wait for one another
# Of its peak a GPU's matrix units sustain so much in a large product.
SUSTAINED = 0.8


@dataclass(frozen=True, kw_only=True)
class Block:
    """Of a product's result, which so many multiprocessors make together."""

    rows: int
    columns: int
    cores: int


# Two thread blocks of 128 x 256 that share a load, and one as the libraries have it.
FUSED_BLOCK = Block(rows=256, columns=256, cores=2)
LIBRARY_BLOCK = Block(rows=128, columns=256, cores=1)


class Product(NamedTuple):
    """A product of the backward, summed over all of its tiles."""

    flops: float  # that the result needs
    waves: int
    done: float  # flops: with what idles in the waves that are not full
    calls: int

    @property
    def efficiency(self) -> float:
        """Of the multiprocessors' time; 1 for no product at all."""
        return self.flops / self.done if self.done else 1.0


class Times(NamedTuple):
    """Of one backward."""

    dlogits: Product  # recomputed ones
    dhidden: Product
    dhead: Product
    bytes: int  # moved by all that is no product
    products_s: float
    seconds: float


def product(
    rows: int, columns: int, depth: int, block: Block, cores: int | None, calls: int
) -> Product:
    """`calls` of it. Where the cores are not known, nothing idles."""
    flops = 2.0 * rows * columns * depth * calls
    if cores is None:
        return Product(flops, 0, flops, calls)
    blocks = -(-rows // block.rows) * -(-columns // block.columns)
    slots = max(1, cores // block.cores)
    waves = -(-blocks // slots)
    done = 2.0 * waves * slots * block.rows * block.columns * depth * calls
    return Product(flops, waves * calls, done, calls)


def _added(*products: Product) -> Product:
    return Product(*map(sum, zip(*products, strict=True)))


def _chunks(problem: Problem, tile: BackwardTile) -> list[tuple[int, int, bool]]:
    """(entries, how many such chunks, whether they were kept)."""
    found = []
    for total, kept in ((tile.keep_v, True), (problem.V - tile.keep_v, False)):
        whole, tail = divmod(total, tile.chunk_v)
        found += [(tile.chunk_v, whole, kept), (tail, 1, kept)]
    return [chunk for chunk in found if chunk[0] and chunk[1]]


def backward_times(
    problem: Problem, tile: BackwardTile, *, fused: bool, height: int
) -> Times:
    """Of a backward of so many rows."""
    D, V, cores = problem.D, problem.V, problem.device.num_cores
    block_t = min(tile.block_t, height)
    blocks = -(-height // block_t)
    nothing = Product(0, 0, 0, 0)
    dlogits, dhidden, dhead = [nothing], [nothing], [nothing]
    chunks, library = _chunks(problem, tile), LIBRARY_BLOCK
    for size, count, kept in chunks:
        calls = count * blocks
        if not kept:
            block = FUSED_BLOCK if fused else library
            dlogits.append(product(block_t, size, D, block, cores, calls))
        dhidden.append(product(block_t, D, size, library, cores, calls))
        dhead.append(product(size, D, block_t, library, cores, calls))
    num_chunks = sum(count for _, count, _ in chunks)
    # The forward writes what it keeps, the backward reads it.
    moved = 2 * kept_bytes(problem, tile.keep_v)
    moved += num_chunks * 2 * problem.acc_itemsize * height * D
    if not writes_dhead_at_once(problem.dtype, problem.T, tile.block_t):
        moved += 2 * problem.acc_itemsize * blocks * V * D
    if num_chunks > 1:
        # XLA copies a chunk of the head, and that of its gradient.
        moved += 4 * problem.itemsize * V * D
    three = _added(*dlogits), _added(*dhidden), _added(*dhead)
    speed = gpu_speed(problem.device)
    # Twice the bytes of an element take twice the time.
    flops_per_s = SUSTAINED * speed.flops_per_s * 2 / problem.itemsize
    products_s = sum(one.done for one in three) / flops_per_s
    rest_s = moved / speed.bytes_per_s + num_chunks * blocks * LAUNCH_S
    return Times(*three, moved, products_s, products_s + rest_s)


def backward_seconds(problem: Problem, tile: BackwardTile, *, fused: bool) -> float:
    """On average over the heights that there is code for, from half of the rows on.

    Batches are made so that less than half of their rows is padding.
    """
    times = [
        backward_times(problem, tile, fused=fused, height=height).seconds
        for height in tile.heights
        if 2 * height >= problem.T
    ]
    return sum(times) / len(times)
