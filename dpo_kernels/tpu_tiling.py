"""Tiles of the TPU kernels, by what fits into a core's vector memory."""

from collections.abc import Iterator
from dataclasses import dataclass

from dpo_kernels.devices import Device
from dpo_kernels.tiling import Problem

MIB = 2**20
SLICE_V = 256  # columns of one matmul, as many as a matrix unit has
ROWS = 16  # of bfloat16 in a register: blocks of rows are multiples
_LANES_BYTES = 128 * 4  # a float32 number for each lane
SPARE = 2 * MIB  # left to the compiler by the limit that a kernel is given
_MARGIN = 6 * MIB  # of what the compiler takes, an estimate, to that limit
# Bytes that the forward's registers that spill take for each logit of a tile, without
# and with a bias or a soft-cap; seen, not derived.
_SPILLED, _SPILLED_CAPPED = 10, 12


@dataclass(frozen=True, kw_only=True)
class Core:
    """What the choice of blocks depends on, of one core."""

    vmem_bytes: int
    flops_per_byte: float  # of bfloat16 matmuls, in the time that moving a byte takes
    weights: int  # rows that are multiplied while a matrix unit's weights are loaded
    most_rows: int  # that pass by them: of more, 7x's matrix units cannot hold the sums


# By the start of the device kind's name, the longest that fits. Peaks and bandwidth are
# those of `jax.experimental.pallas.tpu.get_tpu_info`, of the bandwidth the share that a
# kernel gets; that and `weights` are from the compiler's schedules (bench/README.md).
_CORES = {
    "v5 lite": Core(
        vmem_bytes=128 * MIB, flops_per_byte=240 / 0.8, weights=8, most_rows=2048
    ),
    "v5e": Core(
        vmem_bytes=128 * MIB, flops_per_byte=240 / 0.8, weights=8, most_rows=2048
    ),
    "v5": Core(
        vmem_bytes=64 * MIB, flops_per_byte=187 / 0.8, weights=8, most_rows=2048
    ),
    "v6": Core(
        vmem_bytes=128 * MIB, flops_per_byte=561 / 0.77, weights=32, most_rows=2048
    ),
    "7": Core(
        vmem_bytes=64 * MIB, flops_per_byte=312 / 0.85, weights=60, most_rows=1024
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
class TpuTile:
    """Rows and vocabulary entries of a tile, and the vector memory of its kernel."""

    block_t: int
    block_v: int
    vmem_bytes: int

    def __post_init__(self) -> None:
        """Refuse what the matrix units' layouts do not take."""
        if self.block_t % ROWS or self.block_t < ROWS:
            raise ValueError(f"{self.block_t=} must be a multiple of {ROWS}")
        if self.block_v % SLICE_V or self.block_v < SLICE_V:
            raise ValueError(f"{self.block_v=} must be a multiple of {SLICE_V}")


@dataclass(frozen=True, kw_only=True)
class TpuForwardTile(TpuTile):
    """Blocks of the forward kernel."""

    hidden_buffers: int  # 2: the next block of rows is fetched while this one is used
    cores: int = 1  # of the device, which take blocks of rows in turns


def _heights(T: int, most: int) -> Iterator[int]:
    """Rows of a block, from the most down: powers of two, or all there are."""
    yield min(most, round_up(T, ROWS))
    height = most // 2
    while height >= ROWS:
        if height < round_up(T, ROWS):
            yield height
        height //= 2


def _widths(V: int, most: int) -> Iterator[int]:
    for width in range(most, 0, -SLICE_V):
        if width - SLICE_V < V:
            yield width


def _blocks(problem: Problem, most_v: int) -> Iterator[tuple[int, int]]:
    """Heights and widths, the largest first, lower ones before many narrower ones."""
    for block_t in _heights(problem.T, 1024):
        for block_v in _widths(problem.V, most_v):
            yield block_t, block_v
            if block_v <= 512 and block_t > 256:
                break


def forward_tile(
    problem: Problem, *, states: int = 6, capped: bool = True
) -> TpuForwardTile | None:
    """The largest blocks that fit; None where none do.

    `states` are the running values of a row; `capped` says that there is a bias or a
    soft-cap.

    Of more than 1024 rows the matrix units cannot hold the sums (v7), and one that
    holds only padding is skipped: lower blocks skip more.
    """
    core = core_of(problem.device)
    if core is None:
        return None
    row = problem.D * problem.itemsize
    logit = 4 + (_SPILLED_CAPPED if capped else _SPILLED)
    for block_t, block_v in _blocks(problem, 3072):
        for buffers in (2, 1):
            # Hidden as it comes and packed; one block of states on its way out.
            used = (buffers + 1) * block_t * row + 2 * block_v * row
            used += block_t * (logit * block_v + 2 * states * _LANES_BYTES)
            if used <= core.vmem_bytes - _MARGIN:
                return TpuForwardTile(
                    block_t=block_t,
                    block_v=block_v,
                    hidden_buffers=buffers,
                    cores=problem.device.num_cores or 1,
                    vmem_bytes=core.vmem_bytes - SPARE,
                )
    return None
