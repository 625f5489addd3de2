"""Block sizes, in one place: how many rows and vocabulary entries a tile has."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dpo_kernels.devices import Device, traced_device

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


# Rows of a block when padding rows are to be skipped: small enough to skip most of
# them, large enough to feed the matrix units. Without padding a block is taller.
_RAGGED_BLOCK_T = {"cpu": 256, "gpu": 1024, "tpu": 1024}
_BLOCK_T = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
# On a CPU a tile of float32 logits should stay in the cache between the matmul and
# the passes over it.
_CPU_TILE_BYTES = 4 * 2**20
_CPU_VECTOR = 32


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


def xla_forward_tile(problem: Problem) -> Tile:
    """Tile of `xla.forward_partials`.

    A column holds the float32 logit and one pass's temporary for each row, and a copy
    of the chunk of the head.
    """
    acc = max(4, problem.itemsize)
    return _fit(problem, per_row=2 * acc, per_unit=problem.itemsize)


def backward_tile(problem: Problem) -> Tile:
    """Tile of the shared backward.

    A column holds the logit and its gradient for each row, and for each hidden unit
    the chunk of the head, of its float32 gradient, and of that gradient's cast.
    """
    acc, itemsize = max(4, problem.itemsize), problem.itemsize
    return _fit(problem, per_row=acc + itemsize, per_unit=acc + 2 * itemsize)


def _fit(problem: Problem, *, per_row: int, per_unit: int) -> Tile:
    """The widest chunk within the workspace; off the CPU, chunks as even as can be.

    A column takes `per_row` bytes for each row and `per_unit` for each hidden unit.
    """
    V, workspace_bytes = problem.V, problem.workspace_bytes
    table = _RAGGED_BLOCK_T if problem.ragged else _BLOCK_T
    block_t = max(1, min(problem.T, table[problem.platform]))
    narrowest = min(V, LANES)

    def column_bytes() -> int:
        return per_row * block_t + per_unit * problem.D

    while block_t > LEAST_BLOCK_T and column_bytes() * narrowest > workspace_bytes:
        block_t = -(-block_t // 2)
    if column_bytes() * narrowest > workspace_bytes:
        raise ValueError(
            f"{workspace_bytes=} is too small for a tile of {block_t} rows by "
            f"{narrowest} vocabulary entries at D={problem.D}; give at least "
            f"{column_bytes() * narrowest}"
        )
    most = workspace_bytes // column_bytes()
    if problem.platform == "cpu":
        most = min(most, max(LANES, _CPU_TILE_BYTES // (4 * block_t)))
    if most >= V:
        return Tile(block_t=block_t, chunk_v=max(1, V))
    if problem.platform == "cpu":
        # Odd: rows a power of two apart would compete for the same lines of the cache,
        # which costs a sixth of the time.
        vectors = most // _CPU_VECTOR
        vectors -= vectors % 2 == 0
        return Tile(block_t=block_t, chunk_v=vectors * _CPU_VECTOR)
    chunks = -(-V // (most // LANES * LANES))
    return Tile(block_t=block_t, chunk_v=-(-V // (chunks * LANES)) * LANES)
