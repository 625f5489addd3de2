"""Block sizes, in one place: how many rows and vocabulary entries a tile has."""

from dataclasses import dataclass

LANES = 128  # every chunk but the last is a multiple: what all three platforms like


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Rows and vocabulary entries of one tile of logits."""

    block_t: int
    chunk_v: int

    def __post_init__(self) -> None:
        """Refuse an empty tile."""
        if self.block_t < 1 or self.chunk_v < 1:
            raise ValueError(f"a tile needs at least one row and column: {self}")


# Rows of a block when padding rows are to be skipped: small enough to skip most of
# them, large enough to feed the matrix units. Without padding a block is taller.
_RAGGED_BLOCK_T = {"cpu": 256, "gpu": 1024, "tpu": 1024}
_BLOCK_T = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
# On a CPU a tile of float32 logits should stay in the cache between the matmul and
# the passes over it.
_CPU_TILE_BYTES = 4 * 2**20


def xla_forward_tile(
    T: int,
    D: int,
    V: int,
    *,
    itemsize: int,
    workspace_bytes: int,
    platform: str,
    ragged: bool,
) -> Tile:
    """Tile of `xla.forward_partials`.

    A column holds the float32 logit and one pass's temporary for each row, and a copy
    of the chunk of the head.
    """
    per_row, per_unit = 2 * max(4, itemsize), itemsize
    return _fit(T, D, V, per_row, per_unit, workspace_bytes, platform, ragged)


def backward_tile(
    T: int,
    D: int,
    V: int,
    *,
    itemsize: int,
    workspace_bytes: int,
    platform: str,
    ragged: bool,
) -> Tile:
    """Tile of the shared backward.

    A column holds the logit and its gradient for each row, and for each hidden unit
    the chunk of the head, of its float32 gradient, and of that gradient's cast.
    """
    acc = max(4, itemsize)
    per_row, per_unit = acc + itemsize, acc + 2 * itemsize
    return _fit(T, D, V, per_row, per_unit, workspace_bytes, platform, ragged)


def _fit(
    T: int,
    D: int,
    V: int,
    per_row: int,
    per_unit: int,
    workspace_bytes: int,
    platform: str,
    ragged: bool,
) -> Tile:
    """The widest chunk within the workspace, then evened out over the vocabulary."""
    table = _RAGGED_BLOCK_T if ragged else _BLOCK_T
    block_t = max(1, min(T, table[platform]))
    narrowest = min(V, LANES)
    while block_t > 8 and (per_row * block_t + per_unit * D) * narrowest > (
        workspace_bytes
    ):
        block_t = -(-block_t // 2)
    column_bytes = per_row * block_t + per_unit * D
    if column_bytes * narrowest > workspace_bytes:
        raise ValueError(
            f"{workspace_bytes=} is too small for a tile of {block_t} rows by "
            f"{narrowest} vocabulary entries at D={D}; give at least "
            f"{column_bytes * narrowest}"
        )
    most = workspace_bytes // column_bytes
    if platform == "cpu":
        most = min(most, max(LANES, _CPU_TILE_BYTES // (4 * block_t)))
    if most >= V:
        return Tile(block_t=block_t, chunk_v=max(1, V))
    chunks = -(-V // (most // LANES * LANES))
    return Tile(block_t=block_t, chunk_v=-(-V // (chunks * LANES)) * LANES)
