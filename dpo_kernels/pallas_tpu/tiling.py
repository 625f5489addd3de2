"""Tiles of the TPU kernels, by what fits into a core's vector memory."""

from collections.abc import Iterator
from dataclasses import dataclass

from dpo_kernels.op.devices import Device
from dpo_kernels.op.tiling import Problem

MIB = 2**20
SLICE_V = 256  # columns of one matmul, as many as a matrix unit has
ROWS = 16  # of bfloat16 in a register: blocks of rows are multiples
_LANES_BYTES = 128 * 4  # a float32 number for each lane
SPARE = 2 * MIB  # left to the compiler by the limit that a kernel is given
PIECE_T = 128  # rows of hidden that the forward fetches at once
FORWARD_SLICE_V = 512  # columns whose logits the forward reduces at once
# Bytes of a row that spill while the forward reduces, for each running value; seen.
_SPILLED = 1536
_STEP_V = 64  # columns that take as long as what a step does besides; seen


@dataclass(frozen=True, kw_only=True)
class Core:
    """What the choice of blocks depends on, of one core."""

    vmem_bytes: int
    flops_per_byte: float  # of bfloat16 matmuls, in the time that moving a byte takes
    weights: int  # rows that are multiplied while a matrix unit's weights are loaded
    most_rows: int  # that pass by them: of more, 7x's matrix units cannot hold the sums
    step_flops: float  # that could be done while a pipeline goes to its next step; seen
    keeps_rows: bool = False  # in another layout, while the backward's logits are; seen
    part_rows: int = 1024  # that the forward multiplies at once
    keeps_head: bool = False  # a slice of it, in another layout, in the forward; seen
    unspilled_v: int = 0  # columns of its step in which hardly anything spills; seen
    # Numbers of the head in a block of the forward: the compiler unrolls what is done
    # with one, and takes more than in proportion.
    most_head: int = 2**24


# Peaks and bandwidth are those of `jax.experimental.pallas.tpu.get_tpu_info`, of the
# bandwidth the share that a kernel gets; that and `weights` are from the compiler's
# schedules (bench/README.md).
_V5E = Core(
    vmem_bytes=128 * MIB,
    flops_per_byte=240 / 0.8,
    weights=8,
    step_flops=3e7,
    most_rows=2048,
    keeps_rows=True,
    # Compiled in 45 to 90 s; twice as many, which are no faster, in up to 390 s; seen.
    most_head=2**23,
)
# By the start of the device kind's name, the longest that fits.
_CORES = {
    "v5 lite": _V5E,
    "v5e": _V5E,
    "v5": Core(
        vmem_bytes=64 * MIB,
        flops_per_byte=187 / 0.8,
        weights=8,
        step_flops=3e7,
        most_rows=2048,
        keeps_rows=True,
    ),
    "v6": Core(
        vmem_bytes=128 * MIB,
        flops_per_byte=561 / 0.77,
        weights=8,
        step_flops=2.5e8,
        most_rows=2048,
        # Its sums pass through the vector units, which a part's reduction fills.
        part_rows=256,
        keeps_head=True,
    ),
    "7": Core(
        vmem_bytes=64 * MIB,
        flops_per_byte=312 / 0.85,
        weights=15,
        step_flops=2.5e8,
        most_rows=1024,
        unspilled_v=1024,
    ),
}


def core_of(device: Device) -> Core | None:
    """The core of a TPU that the kernels are made for; None for another device."""
    name = device.kind.lower().removeprefix("tpu").strip()
    found = [key for key in _CORES if name.startswith(key)]
    return _CORES[max(found, key=len)] if found else None


def round_up(x: int, multiple: int) -> int:
    """The least multiple that is not below x."""
    return -(-x // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class TpuForwardTile:
    """Blocks of the forward kernel."""

    block_t: int
    block_v: int
    pieces_ahead: int  # of rows: so many are on their way while others are used
    parts: int  # of the rows: one is reduced during another's matmul
    vmem_bytes: int
    cores: int = 1  # of the device, each of which has a share of the vocabulary

    def __post_init__(self) -> None:
        """Refuse what the matrix units' layouts do not take."""
        if self.block_t % (self.parts * ROWS):
            raise ValueError(f"{self.block_t=} must be {self.parts} times {ROWS}s")
        if self.block_v % min(self.block_v, FORWARD_SLICE_V) or self.block_v % SLICE_V:
            raise ValueError(
                f"{self.block_v=} must be {SLICE_V} or a multiple of {FORWARD_SLICE_V}"
            )

    @property
    def piece_t(self) -> int:
        """Rows that are fetched at once."""
        return min(self.block_t, PIECE_T)

    @property
    def pieces(self) -> int:
        """Of a block of rows; the last may overlap another."""
        return -(-self.block_t // self.piece_t)

    @property
    def rows_ahead(self) -> int:
        """Rows that there is memory for besides the block."""
        return self.pieces_ahead * self.piece_t

    def blocks_of_core(self, V: int) -> int:
        """Blocks of a vocabulary of V entries that a core has at most."""
        return -(-V // (self.block_v * self.cores))


def _heights(T: int, most: int) -> Iterator[int]:
    """Rows of a block, from the most down: powers of two, or all there are."""
    yield min(most, round_up(T, ROWS))
    height = most // 2
    while height >= ROWS:
        if height < round_up(T, ROWS):
            yield height
        height //= 2


def _cost(problem: Problem, core: Core, tile: TpuForwardTile) -> float:
    """What a block of rows takes beside its matmul, in columns of the same time."""
    steps = tile.blocks_of_core(problem.V)
    # Of several cores none knows when it is compiled where V ends.
    found = steps * (_STEP_V + (tile.block_v if tile.cores > 1 else 0))
    if problem.T <= tile.block_t:
        return found
    # While a column of the head, or a row of hidden, is fetched.
    columns = core.flops_per_byte * problem.itemsize / 2 / tile.block_t
    # The next rows' first block of the head is fetched during the last step.
    last_v = problem.V / tile.cores - (steps - 1) * tile.block_v
    found += max(0, tile.block_v * columns - last_v)
    return found + max(0, tile.block_t - tile.rows_ahead) * columns


def _vmem(problem: Problem, core: Core, tile: TpuForwardTile, states: int) -> int:
    """Bytes of vector memory that the tile takes."""
    slice_v = min(tile.block_v, FORWARD_SLICE_V)
    rows = tile.block_t + tile.rows_ahead + 2 * tile.block_v
    rows += slice_v if core.keeps_head else 0
    spilled = 1024 if tile.block_v <= core.unspilled_v else states * _SPILLED
    # Of states and targets, two blocks each: one is on its way.
    windows = 2 * (states + 1) * _LANES_BYTES
    of_row = spilled + windows + 4 * slice_v
    return rows * problem.D * problem.itemsize + tile.block_t * of_row


def forward_tile(problem: Problem, *, states: int = 6) -> TpuForwardTile | None:
    """The largest blocks that fit; None where none do. `states` of a row are running.

    Of more than 1024 rows the matrix units cannot hold the sums (v7), and one that
    holds only padding is skipped: lower blocks skip more.
    """
    core = core_of(problem.device)
    if core is None:
        return None
    most_v = max(SLICE_V, core.most_head // problem.D)
    for height in _heights(problem.T, 1024):
        parts = max(1, height // core.part_rows)
        block_t = round_up(height, parts * ROWS)
        pieces = -(-block_t // PIECE_T)
        tiles = [
            TpuForwardTile(
                block_t=block_t,
                block_v=block_v,
                pieces_ahead=ahead,
                parts=parts,
                cores=problem.device.num_cores or 1,
                vmem_bytes=core.vmem_bytes - SPARE,
            )
            for block_v in (SLICE_V, *range(FORWARD_SLICE_V, 4097, FORWARD_SLICE_V))
            for ahead in range(min(2, pieces), pieces + 1)
            if block_v <= most_v
        ]
        most = core.vmem_bytes - 2 * SPARE
        fitting = [one for one in tiles if _vmem(problem, core, one, states) <= most]
        if fitting:
            return min(
                fitting,
                key=lambda one: (
                    _cost(problem, core, one),
                    one.pieces_ahead,
                    one.block_v,
                ),
            )
    return None
