"""What one optimizer step is given, in three layers, and how it is sharded.

A batch holds A microbatches for N shards (`data * fsdp` devices). The layers answer
three questions: which tokens go through the model (`ModelRows`), which hidden states
are scored, and in which sequence (`ScoredTokens`), and which sequences make a pair
(`Pairs`). Only the first depends on how sequences are laid out in rows.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int32

from engine.parallel.sharding import BATCH, place


class ModelRows(NamedTuple):
    """Rows of the model's input; shard n owns W/N of the W rows, from n*W/N on."""

    tokens: Int32[np.ndarray | Array, "A W S"]  # padded on the right with 0


class ScoredTokens(NamedTuple):
    """The scored tokens of completions; a shard numbers its sequences 0 .. Q-1."""

    # Which of the shard's [W/N * S] hidden states has a scored token next; ascending,
    # so that no state is taken twice. 0 behind the last.
    positions: Int32[np.ndarray | Array, "A N T"]
    targets: Int32[np.ndarray | Array, "A N T"]  # those next tokens; 0 behind the last
    # How many of them each sequence has: they lie in the order of the sequences.
    counts: Int32[np.ndarray | Array, "A N Q"]


class Pairs(NamedTuple):
    """Pair p of a shard's P: sequence p is the chosen, P + p the rejected (Q = 2P)."""

    # How often a pair counts; 0 for a padding pair, whose sequences have no tokens.
    weights: Float32[np.ndarray | Array, "A N P"]
    # The reference's log-probabilities, of the chosen and of the rejected, where they
    # are known before the step: nats, 0 for a padding pair.
    ref_logps: Float32[np.ndarray | Array, "A N 2 P"] | None = None


class Batch(NamedTuple):
    """One optimizer step's pairs. The host's arrays are numpy's."""

    rows: ModelRows
    scored: ScoredTokens
    pairs: Pairs

    @property
    def shape(self) -> tuple[int, int]:
        """(S, T): what differs between the batches of a run."""
        return self.rows.tokens.shape[-1], self.scored.positions.shape[-1]


# Axis 0 counts microbatches, axis 1 shards or their rows.
_BY_SHARD: Any = P(None, BATCH, None)


def batch_specs(with_ref_logps: bool = False) -> Batch:
    """A PartitionSpec in the place of each array."""
    values = _BY_SHARD if with_ref_logps else None
    return Batch(
        rows=ModelRows(tokens=_BY_SHARD),
        scored=ScoredTokens(positions=_BY_SHARD, targets=_BY_SHARD, counts=_BY_SHARD),
        pairs=Pairs(weights=_BY_SHARD, ref_logps=values),
    )


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """The host's arrays on the devices."""
    specs = batch_specs(batch.pairs.ref_logps is not None)
    shardings = jax.tree.map(lambda spec: place(spec, mesh), specs)
    return jax.device_put(batch, shardings)


def abstract_batch(
    shape: tuple[int, int],
    grid: tuple[int, int, int],
    mesh: Mesh,
    with_ref_logps: bool = False,
) -> Batch:
    """The batches of one `shape` (S, T), to compile for; `grid` is A, N and P."""
    (S, T), (A, N, pairs) = shape, grid

    def array(*size: int, dtype: Any = np.int32) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=place(_BY_SHARD, mesh))

    return Batch(
        rows=ModelRows(tokens=array(A, N * 2 * pairs, S)),
        scored=ScoredTokens(
            positions=array(A, N, T),
            targets=array(A, N, T),
            counts=array(A, N, 2 * pairs),
        ),
        pairs=Pairs(
            weights=array(A, N, pairs, dtype=np.float32),
            ref_logps=(
                array(A, N, 2, pairs, dtype=np.float32) if with_ref_logps else None
            ),
        ),
    )
