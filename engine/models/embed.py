"""Looking tokens up in an embedding whose vocabulary is split over devices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dpo_kernels.op.blocks import block_sizes, in_blocks, out_of_blocks
from engine.parallel.row_parts import RowParts
from engine.parallel.sharding import FSDP, TENSOR, VOCAB

# Of what a device looks up for all along fsdp, at a time.
_BLOCK_BYTES = 256 * 2**20


def look_up(
    table: Float[Array, "V_local D"],
    tokens: Int[Array, "R S"],
    parts: RowParts,
    dtype: Any,
) -> Float[Array, "R s D"]:
    """The embeddings, in `dtype`, of this device's part of its rows of tokens.

    Each device looks the tokens of its fsdp row up in its own slice of the vocabulary,
    and those that have the tokens get the sums: of a block of them at a time, as it is
    so many times what a device's own tokens take.
    """
    R, S = tokens.shape
    # A row's pieces are cut alike, so that a block is a row of as many pieces.
    pieces, own = (1, 1) if parts.devices == 1 else (2 * parts.devices, 2)
    rows = 1 if parts.devices == 1 else R
    length = R * S // (rows * pieces)
    ids = tokens.reshape(rows, pieces, length)
    ids = lax.all_gather(ids, FSDP, axis=0, tiled=True, to="invarying")
    ids = ids - lax.axis_index(VOCAB) * table.shape[0]
    found_bytes = ids.size * table.shape[1] * jnp.dtype(dtype).itemsize
    # What is found is what is returned.
    alone = ids.size == tokens.size and parts.devices == 1
    blocks, size = block_sizes(length, 1 if alone else -(-found_bytes // _BLOCK_BYTES))
    of_block = RowParts(pieces * size, parts.devices)

    def one(ids: Array) -> Array:
        ids = ids.reshape(ids.shape[0], -1)
        known = (ids >= 0) & (ids < table.shape[0])
        # Rows are cast after the look-up, so that their gradients add up unrounded.
        found = table[jnp.where(known, ids, 0)].astype(dtype)
        found = jnp.where(known[:, :, None], found, jnp.zeros((), dtype))
        summed = lax.psum_scatter(found, FSDP, scatter_dimension=0, tiled=True)
        summed = lax.psum(of_block.sum_scatter(summed), TENSOR)
        return summed.reshape(rows, own, size, -1)

    if blocks == 1:
        return one(ids).reshape(R, -1, table.shape[1])
    # Computed again for the gradient, or the loop would keep a mask of all elements.
    one = jax.checkpoint(one, prevent_cse=False)
    found = lax.map(one, in_blocks(ids, 2, blocks, size))
    return out_of_blocks(found, 2, length).reshape(R, -1, table.shape[1])
