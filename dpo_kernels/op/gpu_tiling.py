"""Tiles of the GPU kernels, by device, dtype and shape."""

from dataclasses import dataclass

import jax.numpy as jnp

from dpo_kernels.op.devices import Device
from dpo_kernels.op.tiling import Problem


@dataclass(frozen=True, kw_only=True)
class TritonTile:
    """What one program computes: logits [block_t, block_v], in steps of block_d."""

    block_t: int
    block_v: int
    block_d: int
    group_t: int  # row blocks that run side by side, to share head rows in the L2 cache
    num_warps: int
    num_stages: int  # steps in flight between memory and the matrix units

    def __post_init__(self) -> None:
        """Refuse what Triton cannot compile."""
        for name in ("block_t", "block_v", "block_d"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two from 16 up")


# By the bytes of an element. Large: for 9.0 and 10.x, with 227 KiB of shared memory, of
# which num_stages * (block_t + block_v) * block_d elements are taken. Small: for 8.x
# and 12.x, with 99 KiB or more; without options two fit on a multiprocessor, so that
# one multiplies while the other reduces.
_HALF, _SINGLE = 2, 4
_LARGE = {
    _HALF: TritonTile(
        block_t=128, block_v=256, block_d=64, group_t=16, num_warps=8, num_stages=4
    ),
    _SINGLE: TritonTile(
        block_t=64, block_v=128, block_d=32, group_t=16, num_warps=8, num_stages=3
    ),
}
_SMALL = {
    _HALF: TritonTile(
        block_t=128, block_v=128, block_d=32, group_t=8, num_warps=8, num_stages=4
    ),
    _SINGLE: TritonTile(
        block_t=64, block_v=64, block_d=32, group_t=16, num_warps=4, num_stages=3
    ),
}


def triton_tile(device: Device, dtype: jnp.dtype) -> TritonTile:
    """Tile of both `triton` kernels; float32 takes three passes, and smaller tiles."""
    assert device.capability is not None, "the backend asks for it in `unsupported`"
    table = _LARGE if device.capability[0] in (9, 10) else _SMALL
    return table[dtype.itemsize]


SHARED_BYTES = 227 * 1024  # of a thread block on compute capability 9.0


@dataclass(frozen=True, kw_only=True)
class MosaicTile:
    """Blocks of a Hopper kernel, and how its grid walks over them."""

    block_t: int = 128  # rows of a tile: each of two warpgroups takes half
    block_v: int = 256  # vocabulary entries of a tile
    block_d: int = 64  # hidden units of a stage
    stages: int = 4  # of shared memory that hold operands on their way
    cluster: int = 2  # thread blocks, one below the other, that share loads of the head
    group_t: int = 8  # clusters that pass over the vocabulary together: see mosaic_tile

    def __post_init__(self) -> None:
        """Refuse what the tensor cores or the copy engine cannot take."""
        if self.block_t != 128:
            raise ValueError(f"{self.block_t=} must be 128: 64 for each warpgroup")
        if self.block_v % 64 or not 64 <= self.block_v <= 256:
            raise ValueError(f"{self.block_v=} must be 64, 128, 192 or 256")
        if self.block_d != 64:
            raise ValueError(f"{self.block_d=} must be 64: 128 bytes of bf16 or f16")
        stage_bytes = 2 * self.block_d * (self.block_t + self.block_v)
        if self.stages * stage_bytes > SHARED_BYTES:
            raise ValueError(
                f"{self.stages} stages of {stage_bytes} bytes are more shared memory "
                f"than the {SHARED_BYTES} there are; use fewer, or a narrower block_v"
            )
        if self.stages < 2 or self.cluster not in (1, 2) or self.group_t < 1:
            raise ValueError(f"needs 2 or more stages, a cluster of 1 or 2: {self}")


# A group's rows of hidden should stay in half of the 50 MB second-level cache.
_GROUP_BYTES = 16 * 2**20


def mosaic_tile(problem: Problem) -> MosaicTile:
    """Blocks for `mosaic_gpu`.

    While a wave of tiles is under way it reads `group_t` clusters' rows of hidden and
    about as many entries of the head, so that the operands are fetched from memory
    about 2 T V D (1 / rows + 1 / entries) / 2 times, far below its bandwidth.
    """
    tile = MosaicTile()
    cluster_bytes = tile.cluster * tile.block_t * problem.D * problem.itemsize
    return MosaicTile(group_t=max(1, min(16, _GROUP_BYTES // cluster_bytes)))
