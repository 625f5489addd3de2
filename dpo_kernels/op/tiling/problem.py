"""What a tile is, and what it is chosen for."""

from dataclasses import dataclass

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
