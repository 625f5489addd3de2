"""The rows of hidden that the TPU's forward multiplies, in the matrix units' layout.

A matrix unit takes two rows of bfloat16 in each register's 32-bit lanes; memory holds
them otherwise. Left to the compiler, a block of rows is laid out anew for every block
of the vocabulary, into a copy that takes as much memory again. Here each block is laid
out once, as it arrives, and what it arrives in is smaller than the block.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from dpo_kernels.pallas_tpu.tiling import ROWS, TpuForwardTile, round_up

_TILE_T = 8  # rows of a tile of HBM


def scratch_shapes(tile: TpuForwardTile, D: int, dtype: Any) -> tuple[Any, ...]:
    """What `PackedRows` needs: the rows, what they arrive in, and word that they did.

    The dtype is one of 16 bits.
    """
    return (
        pltpu.VMEM((tile.block_t // 2, D), jnp.int32),
        pltpu.VMEM((tile.pieces_ahead, tile.piece_t, D), dtype),
        pltpu.SemaphoreType.DMA((tile.pieces_ahead,)),
    )


class PackedRows:
    """A block of rows of hidden, and the pieces of it that are on their way.

    Pieces are numbered through all blocks of rows, and take turns in the memory that
    they arrive in. One without a valid row is not fetched.
    """

    def __init__(
        self, hidden: Any, scratch: tuple[Any, ...], tile: TpuForwardTile, valid: Any
    ):
        """`hidden` is in HBM, of 16 rows or more; `scratch` as in `scratch_shapes`."""
        self.hidden, self.tile, self.valid = hidden, tile, valid
        self.packed, self.arriving, self.arrived = scratch

    def __getitem__(self, rows: slice) -> Array:
        """Some of the block, `[rows, D]`, from and to even numbers."""
        pairs = self.packed[rows.start // 2 : rows.stop // 2]
        return pltpu.bitcast(pairs, self.hidden.dtype)

    def load(self, block: Any) -> None:
        """Lays out the block of this number, once it has arrived.

        Blocks are to be loaded in turn from 0 on, while they have a valid row.
        """
        tile, pieces = self.tile, self.tile.pieces

        @pl.when(block == 0)
        def _() -> None:
            for n in range(tile.pieces_ahead):
                pl.when(self._is_fetched(n))(self._copy(n).start)

        def pack(k: Any, carry: Any) -> Any:
            n = block * pieces + k

            @pl.when(self._is_fetched(n))
            def _() -> None:
                self._copy(n).wait()
                at = pl.multiple_of(self._place(k) // 2, ROWS // 2)
                rows = self.arriving[lax.rem(n, tile.pieces_ahead)]
                pairs = pltpu.bitcast(rows, self.packed.dtype)
                self.packed[pl.ds(at, tile.piece_t // 2)] = pairs

            following = n + tile.pieces_ahead
            pl.when(self._is_fetched(following))(self._copy(following).start)
            return carry

        lax.fori_loop(0, pieces, pack, 0)

    def _place(self, k: Any) -> Any:
        """The first row of a block's piece k: the last may repeat rows of another."""
        last = self.tile.block_t - self.tile.piece_t
        return jnp.minimum(k * self.tile.piece_t, last)

    def _start(self, n: Any) -> Any:
        """The first row of piece n."""
        block, k = n // self.tile.pieces, lax.rem(n, self.tile.pieces)
        return block * self.tile.block_t + self._place(k)

    def _is_fetched(self, n: Any) -> Any:
        return self._start(n) < self.valid

    def _copy(self, n: Any) -> Any:
        start, size = pl.multiple_of(self._start(n), ROWS), self.tile.piece_t
        slot = lax.rem(n, self.tile.pieces_ahead)
        T = self.hidden.shape[0]
        if T % size or self.tile.block_t % size:
            # An array ends with a whole tile of memory, and there is no more to copy.
            left = round_up(T, _TILE_T) - start
            size = pl.multiple_of(jnp.clip(left, 0, size), _TILE_T)
        return pltpu.make_async_copy(
            self.hidden.at[pl.ds(start, size)],
            self.arriving.at[slot, pl.ds(0, size)],
            self.arrived.at[slot],
        )
