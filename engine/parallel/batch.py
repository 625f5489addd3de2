"""What one optimizer step is given, in three layers, and how it is sharded.

A batch holds A microbatches for N shards (`data * fsdp` devices). The layers answer
three questions: which tokens go through the model (`ModelRows`), which hidden states
are scored, and in which sequence (`ScoredTokens`), and which sequences make a pair
(`Pairs`). Only the first depends on how sequences are laid out in rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int32

from engine.parallel.sharding import BATCH, DATA, FSDP, place


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
    """One optimizer step's pairs. The host's arrays are numpy's.

    Of those that grow with the tokens (`tokens`, `positions`, `targets`) the host has
    only the shards that are its process's own, in their order.
    """

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


def own_shards(mesh: Mesh) -> tuple[int, ...]:
    """Which of the batch's shards devices of this process hold."""
    number = mesh.shape[DATA] * mesh.shape[FSDP]
    sharding = NamedSharding(mesh, P(BATCH))
    held: Any = sharding.addressable_devices_indices_map((number,))
    return tuple(sorted({index[0].start or 0 for index in held.values()}))


def put_whole(x: Any, mesh: Mesh) -> jax.Array:
    """A number or an array that every process has, whole on each device."""
    array = np.asarray(x)
    return jax.make_array_from_callback(
        array.shape, place(P(), mesh), lambda index: array[index]
    )


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """The host's arrays on the devices, each of which takes its own shard."""
    specs = batch_specs(batch.pairs.ref_logps is not None)
    shardings = jax.tree.map(lambda spec: place(spec, mesh), specs)
    own, number = own_shards(mesh), mesh.shape[DATA] * mesh.shape[FSDP]
    if len(own) == number and shardings.rows.tokens.is_fully_addressable:
        return jax.device_put(batch, shardings)

    def put(x: Any, sharding: NamedSharding, shards: Sequence[int]) -> jax.Array:
        """An array that has these shards along axis 1."""
        size = x.shape[1] // len(shards)

        def piece(index: Any) -> np.ndarray:
            if number == 1:  # and nothing is sharded
                return x[index]
            place = shards.index((index[1].start or 0) // size)
            return x[:, place * size : (place + 1) * size]

        shape = (x.shape[0], number * size, *x.shape[2:])
        return jax.make_array_from_callback(shape, sharding, piece)

    everyones = range(number)

    def whole(x: Any, sharding: Any) -> jax.Array | None:
        return None if x is None else put(x, sharding, everyones)

    rows, scored, pairs = shardings
    return Batch(
        rows=ModelRows(tokens=put(batch.rows.tokens, rows.tokens, own)),
        scored=ScoredTokens(
            positions=put(batch.scored.positions, scored.positions, own),
            targets=put(batch.scored.targets, scored.targets, own),
            counts=put(batch.scored.counts, scored.counts, everyones),
        ),
        pairs=Pairs(
            weights=put(batch.pairs.weights, pairs.weights, everyones),
            ref_logps=whole(batch.pairs.ref_logps, pairs.ref_logps),
        ),
    )


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
