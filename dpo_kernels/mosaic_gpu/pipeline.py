"""The matmul loop of the Hopper kernels: tiles of hidden @ head.T, one after another.

One persistent block a streaming multiprocessor. Of its three warpgroups one keeps the
copy engine busy, the other two multiply, each its half of the tile's rows, and finish
the tile in registers. The stages of shared memory run on from tile to tile: while one
warpgroup is finishing, the other multiplies, and the next tile's operands arrive.

Step n, counted from the first tile on, uses stage n % stages. Each stage has a barrier
of either kind; a phase of it is one use of the stage.

              copying warpgroup               multiplying warpgroups (two a block)
    step n    wait empty[stage]  <-----+      wait full[stage]  <------------+
              (from n = stages on)     |      multiply, wait for step n - 1  |
              copy hidden, copy head   |      arrive empty[stage of n - 1]   |
                    |                  +----------------+                    |
                    +-- the copy engine arrives when the bytes are there ----+

    full    2 arrivals a phase: the copies of hidden and of head. Whoever waits: both
            multiplying warpgroups of this block, each once a step. In a cluster each
            block copies half of the head's rows to both blocks, and a block's barrier
            counts the bytes of the whole: it does not matter who sent them.
    empty   An arrival of each multiplying warpgroup of each block in the cluster, as a
            copy of the head writes to both blocks: 2 or 4 a phase. Whoever waits: the
            copying warpgroup, once a step, before it fills the stage again.

At the end the copying warpgroup waits for every stage once more: a block that ended
sooner could still be written to, or arrived at, by its neighbour.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu
import jax.numpy as jnp
from jax import lax

from dpo_kernels.mosaic_gpu import axes
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
class TileScheduler:
    """The tiles of one thread block, and its stages of shared memory, in turn."""

    tile: MosaicTile
    steps: int  # stages to a tile
    blocks_v: int
    groups_t: Any  # clusters of rows that hold a valid one

    @classmethod
    def over(cls, hidden_g: Any, head_g: Any, num_valid: Any, tile: MosaicTile):
        """All tiles that hold a valid row, shared out among the blocks."""
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
        first, stride = lax.axis_index(axes.SM), lax.axis_size(axes.SM)
        tiles = self.groups_t * self.blocks_v
        return lax.div(tiles - first + (stride - 1), stride)

    def origin(self, i: Any) -> tuple[Any, Any]:
        """First row and vocabulary entry of this block's i-th tile."""
        group, block_v = plgpu.planar_snake(
            lax.axis_index(axes.SM) + i * lax.axis_size(axes.SM),
            (self.groups_t, self.blocks_v),
            0,
            self.tile.group_t,
        )
        block_t = group * self.tile.cluster + lax.axis_index(axes.CLUSTER)
        return block_t * self.tile.block_t, block_v * self.tile.block_v

    def slot(self, step: Any) -> Any:
        """Where the operands of a step are, counted from the first tile on."""
        return lax.rem(step, jnp.int32(self.tile.stages))


def _copy_tiles(
    scheduler: TileScheduler, hidden_g, head_g, hidden_s, head_s, full, empty
) -> None:
    """What the third warpgroup does: keep every stage filled."""
    tile = scheduler.tile

    def wait_until_empty(step: Any) -> None:
        @pl.when(step >= tile.stages)
        def _():
            plgpu.barrier_wait(empty.at[scheduler.slot(step)])

    def copy_tile(i: Any, _: None) -> None:
        row, column = scheduler.origin(i)

        def copy(k: Any, _: None) -> None:
            step = i * scheduler.steps + k
            at, depth = scheduler.slot(step), pl.ds(k * tile.block_d, tile.block_d)
            wait_until_empty(step)
            rows, entries = pl.ds(row, tile.block_t), pl.ds(column, tile.block_v)
            plgpu.copy_gmem_to_smem(
                hidden_g.at[rows, depth], hidden_s.at[at], full.at[at]
            )
            # Each member of the cluster loads its share, and all get all.
            plgpu.copy_gmem_to_smem(
                head_g.at[entries, depth],
                head_s.at[at],
                full.at[at],
                collective_axes=axes.CLUSTER if tile.cluster > 1 else None,
            )

        lax.fori_loop(0, scheduler.steps, copy, None)

    def drain(j: Any, _: None) -> None:
        wait_until_empty(scheduler.num_tiles * scheduler.steps + j)

    lax.fori_loop(0, scheduler.num_tiles, copy_tile, None)
    lax.fori_loop(0, tile.stages, drain, None)


def _multiply(
    scheduler: TileScheduler, i: Any, hidden_rows, hidden_s, head_s, full, empty
) -> Any:
    """A warpgroup's share of its block's i-th tile, in registers."""

    def accumulate(acc_ref: Any) -> jax.Array:
        def multiply(k: Any, _: None) -> None:
            step = i * scheduler.steps + k
            at = scheduler.slot(step)
            plgpu.barrier_wait(full.at[at])
            plgpu.wgmma(
                acc_ref, hidden_s.at[at, hidden_rows], head_s.at[at].transpose((1, 0))
            )
            # One step's products stay under way while the next's operands are waited
            # for; those of the step before are done.
            plgpu.wgmma_wait(1)

            @pl.when(k > 0)
            def _():
                plgpu.barrier_arrive(empty.at[scheduler.slot(step - 1)])

        lax.fori_loop(0, scheduler.steps, multiply, None)
        acc = acc_ref[...]
        last = i * scheduler.steps + (scheduler.steps - 1)

        # Always so: who is here has a tile. Without a branch the assembler puts the
        # arrival behind the arithmetic of the epilogue, and the stage is refilled late.
        @pl.when(scheduler.groups_t > 0)
        def _():
            plgpu.barrier_arrive(empty.at[scheduler.slot(last)])

        return acc

    shape = scheduler.tile.block_t // WARPGROUPS, scheduler.tile.block_v
    return pl.run_scoped(accumulate, plgpu.ACC(shape, jnp.float32))


Refs = Mapping[str, Any]  # operands, outputs and scratch of an epilogue, by name


@runtime_checkable
class Epilogue[Prefetched](Protocol):
    """What is to be done with a tile of products, by each multiplying warpgroup.

    It has block_t / 2 rows of the tile. `scratch` in shared memory has an array for
    each warpgroup, in a leading dimension of 2; `refs` have this one's.
    """

    @property
    def name(self) -> str:
        """Of the kernel."""
        ...

    @property
    def operands(self) -> dict[str, jax.Array]:
        """Beside hidden, head and the number of valid rows."""
        ...

    @property
    def outputs(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What the kernel returns."""
        ...

    @property
    def scratch(self) -> dict[str, Any]:
        """Types of shared memory."""
        ...

    def prefetch(self, refs: Refs, row: Any) -> Prefetched:
        """Before the multiplication, which hides the loads: of the rows from `row`."""
        ...

    def __call__(
        self, refs: Refs, acc: jax.Array, row: Any, column: Any, fetched: Prefetched
    ) -> None:
        """Finish float32 products [block_t / 2, block_v] from (row, column) on."""
        ...


def logits_kernel(
    epilogue: Epilogue,
    hidden: jax.Array,
    head: jax.Array,
    num_valid: jax.Array,
    *,
    tile: MosaicTile,
    num_cores: int,
) -> dict[str, jax.Array]:
    """Launch a kernel that makes every tile of hidden @ head.T and finishes each.

    Of hidden [T, D] and head [V, D] 64 divides D, 8 divides T and V; `num_valid` is
    int32[1]: clusters of padding rows alone have no tiles.
    """
    height = tile.block_t // WARPGROUPS
    names = (*epilogue.operands, *epilogue.outputs)

    def body(hidden_g, head_g, num_valid_g, *refs):
        named = dict(zip(names, refs, strict=False))
        hidden_s, head_s, full, empty, *own = refs[len(names) :]
        staged = hidden_s, head_s, full, empty
        scheduler = TileScheduler.over(hidden_g, head_g, num_valid_g[0], tile)
        wg = lax.axis_index(axes.WARPGROUP)

        @pl.when(wg == WARPGROUPS)
        def _():
            plgpu.set_max_registers(_COPY_REGISTERS, action="decrease")
            _copy_tiles(scheduler, hidden_g, head_g, *staged)

        @pl.when(wg < WARPGROUPS)
        def _():
            plgpu.set_max_registers(_MATH_REGISTERS, action="increase")

            def tile_of_logits(i: Any, _: None) -> None:
                scratch = {
                    name: ref.at[wg]
                    for name, ref in zip(epilogue.scratch, own, strict=True)
                }
                row, column = scheduler.origin(i)
                row += wg * height
                fetched = epilogue.prefetch(named, row)
                acc = _multiply(scheduler, i, pl.ds(wg * height, height), *staged)
                epilogue(named | scratch, acc, row, column, fetched)

            lax.fori_loop(0, scheduler.num_tiles, tile_of_logits, None)
            plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=tuple(epilogue.outputs.values()),
        scratch_types=[*_stages(tile, hidden.dtype), *epilogue.scratch.values()],
        grid=(num_cores // tile.cluster,),
        grid_names=(axes.SM,),
        cluster=(tile.cluster,),
        cluster_names=(axes.CLUSTER,),
        num_threads=WARPGROUPS + 1,
        thread_name=axes.WARPGROUP,
        # exp2, tanh's division: 2 units in the last place of float32.
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=epilogue.name,
    )
    # Loop counters and indices are int32, whatever the caller's default is.
    with jax.enable_x64(False):
        found = kernel(hidden, head, num_valid, *epilogue.operands.values())
    return dict(zip(epilogue.outputs, found, strict=True))


def _stages(tile: MosaicTile, dtype: Any) -> list[Any]:
    """Shared memory for the operands, and the barriers full and empty."""
    operands = [
        plgpu.SMEM(
            (tile.stages, block, tile.block_d),
            dtype,
            transforms=swizzled(tile.block_d, dtype),
        )
        for block in (tile.block_t, tile.block_v)
    ]
    full = plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages)
    readers = {"num_arrivals": WARPGROUPS, "num_barriers": tile.stages}
    if tile.cluster == 1:
        return [*operands, full, plgpu.Barrier(**readers)]
    # Of both blocks: arrivals are counted over the axis.
    empty = plgpu.ClusterBarrier(collective_axes=(axes.CLUSTER,), **readers)
    return [*operands, full, empty]
