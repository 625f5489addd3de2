"""Block sizes of what backends share: what fits, what it costs, and the choice.

    python -m dpo_kernels.op.tiling T D V --device h200

`fits` counts bytes, `time` seconds, `choice` takes the fastest of what fits.
"""

from dpo_kernels.op.tiling.choice import backward_tile, xla_forward_tile
from dpo_kernels.op.tiling.fits import writes_dhead_at_once
from dpo_kernels.op.tiling.problem import (
    LANES,
    LEAST_BLOCK_T,
    BackwardTile,
    Problem,
    Tile,
    problem_of,
)

__all__ = [
    "LANES",
    "LEAST_BLOCK_T",
    "BackwardTile",
    "Problem",
    "Tile",
    "backward_tile",
    "problem_of",
    "writes_dhead_at_once",
    "xla_forward_tile",
]
