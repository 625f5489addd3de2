"""The matmul loop of the Hopper kernels: tiles of hidden @ head.T, one after another.

One persistent block a streaming multiprocessor. Of its three warpgroups one keeps the
copy engine busy, the other two multiply, each its half of the tile's rows, and finish
the tile in registers. The stages of shared memory run on from tile to tile: while one
warpgroup is finishing, the other multiplies, and the next tile's operands arrive.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu
import jax.numpy as jnp
from jax import lax

from dpo_kernels.op.gpu_tiling import MosaicTile

# Any: a type checker takes some of its classes for abstract, others for private.
plgpu: Any = jax.experimental.pallas.mosaic_gpu
ROWS = plgpu.Layout.WGMMA.reduce(1)  # of a vector with one value for each row of a tile
COLUMNS = plgpu.Layout.WGMMA.reduce(0)
WARPGROUPS = 2  # that multiply
# Of the 512 registers that a thread of each of the three could have at most, on
# average 168: the copying warpgroup leaves what it does not need to the other two.
_COPY_REGISTERS, _MATH_REGISTERS = 24, 240


def swizzled(width: int, dtype: Any) -> tuple[Any, Any]:
    """Transforms of a matrix in shared memory whose rows hold `width` entries."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(8 * itemsize * width)
    return (
        plgpu.TilingTransform((8, swizzle // itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """The tiles of one thread block, and its stages of shared memory, in turn."""

    tile: MosaicTile
    steps: int  # stages to a tile
    blocks_v: int
    groups_t: Any  # clusters of rows that hold a valid one

    @classmethod
    def over(cls, hidden_g: Any, head_g: Any, num_valid: Any, tile: MosaicTile):
        rows = jnp.int32(tile.cluster * tile.block_t)
        return cls(
            tile=tile,
            steps=hidden_g.shape[1] // tile.block_d,
            blocks_v=pl.cdiv(head_g.shape[0], tile.block_v),
            groups_t=lax.div(num_valid + (rows - 1), rows),
        )

    @property
    def num_tiles(self) -> Any:
        """Of this block: blocks of padding rows have no tiles at all."""
        first, stride = lax.axis_index("sm"), lax.axis_size("sm")
        tiles = self.groups_t * self.blocks_v
        return lax.div(tiles - first + (stride - 1), stride)

    def origin(self, i: Any) -> tuple[Any, Any]:
        """First row and vocabulary entry of this block's i-th tile."""
        group, block_v = plgpu.planar_snake(
            lax.axis_index("sm") + i * lax.axis_size("sm"),
            (self.groups_t, self.blocks_v),
            0,
            self.tile.group_t,
        )
        block_t = group * self.tile.cluster + lax.axis_index("cluster")
        return block_t * self.tile.block_t, block_v * self.tile.block_v

    def slot(self, step: Any) -> Any:
        """Where the operands of a step are, counted from the first tile on."""
        return lax.rem(step, jnp.int32(self.tile.stages))


def _copy_tiles(walk: _Walk, hidden_g, head_g, hidden_s, head_s, full, empty) -> None:
    """What the third warpgroup does: keep every stage filled."""
    tile = walk.tile

    def reuse(step: Any) -> None:
        @pl.when(step >= tile.stages)
        def _():
            plgpu.barrier_wait(empty.at[walk.slot(step)])

    def copy_tile(i: Any, _: None) -> None:
        row, column = walk.origin(i)

        def copy(k: Any, _: None) -> None:
            step = i * walk.steps + k
            at, depth = walk.slot(step), pl.ds(k * tile.block_d, tile.block_d)
            reuse(step)
            rows, entries = pl.ds(row, tile.block_t), pl.ds(column, tile.block_v)
            plgpu.copy_gmem_to_smem(
                hidden_g.at[rows, depth], hidden_s.at[at], full.at[at]
            )
            # Each member of the cluster loads its share, and all get all.
            plgpu.copy_gmem_to_smem(
                head_g.at[entries, depth],
                head_s.at[at],
                full.at[at],
                collective_axes="cluster" if tile.cluster > 1 else None,
            )

        lax.fori_loop(0, walk.steps, copy, None)

    def drain(j: Any, _: None) -> None:
        reuse(walk.num_tiles * walk.steps + j)

    lax.fori_loop(0, walk.num_tiles, copy_tile, None)
    # A block that ended now could still be written to by its neighbour.
    lax.fori_loop(0, tile.stages, drain, None)


def _multiply(walk: _Walk, i: Any, hidden_rows, hidden_s, head_s, full, empty) -> Any:
    """A warpgroup's share of its block's i-th tile, in registers."""

    def accumulate(acc_ref: Any) -> jax.Array:
        def multiply(k: Any, _: None) -> None:
            step = i * walk.steps + k
            at = walk.slot(step)
            plgpu.barrier_wait(full.at[at])
            plgpu.wgmma(
                acc_ref, hidden_s.at[at, hidden_rows], head_s.at[at].transpose((1, 0))
            )
            # One step's products stay under way while the next's operands are waited
            # for; those of the step before are done.
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def _():
                plgpu.barrier_arrive(empty.at[walk.slot(step - 1)])

        lax.fori_loop(0, walk.steps, multiply, None)
        acc = acc_ref[...]
        last = i * walk.steps + (walk.steps - 1)
        plgpu.barrier_arrive(empty.at[walk.slot(last)])
        return acc

    shape = walk.tile.block_t // WARPGROUPS, walk.tile.block_v
    return pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))


def logits_kernel(
    begin: Callable[..., Any],
    finish: Callable[..., None],
    *,
    tile: MosaicTile,
    num_cores: int,
    operands: Sequence[jax.Array],
    out_type: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[Any],
    name: str,
) -> tuple[jax.Array, ...]:
    """Launch a kernel that makes every tile of hidden @ head.T and finishes each.

    Args:
        begin: of a tile's first row and the operands after the third: called by each
            multiplying warpgroup before the matmul, for loads that the matmul hides.
        finish: of (acc, row, column, what begin gave, operands after the third,
            outputs, scratch of this warpgroup): does what is to be done with a
            warpgroup's [block_t / 2, block_v] of float32 products.
        operands: hidden [T, D], head [V, D], the number of valid rows int32[1], and
            whatever `begin` and `finish` need. 64 divides D, 8 divides T and V.
        scratch: in shared memory, an array for each warpgroup: leading dimension 2.
    """
    dtype, height = operands[0].dtype, tile.block_t // WARPGROUPS

    def body(hidden_g, head_g, num_valid_g, *refs):
        extra, refs = refs[: len(operands) - 3], refs[len(operands) - 3 :]
        outs, refs = refs[: len(out_type)], refs[len(out_type) :]
        hidden_s, head_s, full, empty, *own = refs
        staged = hidden_s, head_s, full, empty
        walk = _Walk.over(hidden_g, head_g, num_valid_g[0], tile)
        wg = lax.axis_index("wg")

        @pl.when(wg == WARPGROUPS)
        def _():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
            _copy_tiles(walk, hidden_g, head_g, *staged)

        @pl.when(wg < WARPGROUPS)
        def _():
            plgpu.set_max_registers(_MATH_REGISTERS, action="increase")

            def tile_of_logits(i: Any, _: None) -> None:
                row, column = walk.origin(i)
                row += wg * height
                state = begin(row, *extra)
                acc = _multiply(walk, i, pl.ds(wg * height, height), *staged)
                finish(acc, row, column, state, extra, outs, [s.at[wg] for s in own])

            lax.fori_loop(0, walk.num_tiles, tile_of_logits, None)
            plgpu.wait_smem_to_gmem(0)

    empty_barriers = {"num_arrivals": WARPGROUPS, "num_barriers": tile.stages}
    stages = [
        plgpu.SMEM(
            (tile.stages, block, tile.block_d),
            dtype,
            transforms=swizzled(tile.block_d, dtype),
        )
        for block in (tile.block_t, tile.block_v)
    ]
    kernel = plgpu.kernel(
        body,
        out_type=tuple(out_type),
        scratch_types=[
            *stages,
            plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
            plgpu.ClusterBarrier(collective_axes=("cluster",), **empty_barriers)
            if tile.cluster > 1
            else plgpu.Barrier(**empty_barriers),
            *scratch,
        ],
        grid=(num_cores // tile.cluster,),
        grid_names=("sm",),
        cluster=(tile.cluster,),
        cluster_names=("cluster",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        # exp2, tanh's division: 2 units in the last place of float32.
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )
    # Loop counters and indices are int32, whatever the caller's default is.
    with jax.enable_x64(False):
        return kernel(*operands)
