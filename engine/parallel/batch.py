"""What one optimizer step is given, in three layers, and how it is sharded.

A batch holds A microbatches for N shards (`data * fsdp` devices). The layers answer
three questions: which tokens go through the model (`ModelRows`), which hidden states
are scored, and in which sequence (`ScoredTokens`), and which sequences make a pair
(`Pairs`). Only the first depends on how sequences are laid out in rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int32

from engine.parallel.sharding import BATCH, DATA, FSDP, place


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How the sequences of a shard's microbatch are laid out in rows."""

    packing: bool = False  # one after another in a single row
    share_prompt: bool = False  # what both sequences of a pair begin with, once
    longest: int | None = None  # tokens that no sequence has more of, where known

    @property
    def with_spans(self) -> bool:
        """Whether a row may hold more than one sequence."""
        return self.packing or self.share_prompt

    def rows(self, pairs: int) -> int:
        """Rows of so many pairs."""
        if self.packing:
            return 1
        return pairs if self.share_prompt else 2 * pairs


PADDED = Arrangement()  # a row for each sequence


class KeySpans(NamedTuple):
    """Which keys of its row a token sees: [first, shared_end) and [begin, itself].

    A row holds groups of sequences that begin alike. A group is its shared beginning,
    [first, shared_end), and a branch for what is each sequence's own. A token of the
    shared part has begin = first, and so has one of a sequence that shares nothing, for
    which shared_end = first as well. Padding sees itself alone.
    """

    first: Int32[np.ndarray | Array, "*A W S"]
    shared_end: Int32[np.ndarray | Array, "*A W S"]
    begin: Int32[np.ndarray | Array, "*A W S"]

    @classmethod
    def of_groups(cls, groups: Iterable[Sequence[int]], length: int) -> "KeySpans":
        """Those of one row [1, length], padded at its end.

        groups: for each its shared tokens, and the own tokens of each of its sequences.
        """
        row = np.arange(length, dtype=np.int32)[None]
        first, shared_end, begin = row.copy(), row.copy(), row.copy()
        start = 0
        for shared, *owns in groups:
            at = start
            for head, size in ((0, shared), *((shared, own) for own in owns)):
                part = slice(at, at + size)
                first[0, part], shared_end[0, part] = start, start + head
                begin[0, part] = at
                at += size
            start = at
        return cls(first, shared_end, begin)

    @property
    def positions(self) -> Any:
        """Each token's number in its own sequence."""
        index = np.arange(self.first.shape[-1], dtype=np.int32)
        index = np.expand_dims(index, tuple(range(self.first.ndim - 1)))
        return index - self.begin + self.shared_end - self.first


class ModelRows(NamedTuple):
    """Rows of the model's input; shard n owns W/N of the W rows, from n*W/N on."""

    tokens: Int32[np.ndarray | Array, "A W S"]  # padded on the right with 0
    # None: each row is one sequence, and a token sees all before it.
    spans: KeySpans | None = None


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


def batch_specs(
    with_ref_logps: bool = False, arrangement: Arrangement = PADDED
) -> Batch:
    """A PartitionSpec in the place of each array."""
    values = _BY_SHARD if with_ref_logps else None
    spans = KeySpans(*[_BY_SHARD] * 3) if arrangement.with_spans else None
    return Batch(
        rows=ModelRows(tokens=_BY_SHARD, spans=spans),
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
    sharding = place(_BY_SHARD, mesh)
    shardings = jax.tree.map(lambda _: sharding, batch)
    own, number = own_shards(mesh), mesh.shape[DATA] * mesh.shape[FSDP]
    if len(own) == number and sharding.is_fully_addressable:
        return jax.device_put(batch, shardings)

    def put(x: Any, shards: Sequence[int]) -> jax.Array:
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

    def put_own(tree: Any) -> Any:
        return jax.tree.map(lambda x: put(x, own), tree)

    def put_everyones(tree: Any) -> Any:
        return jax.tree.map(lambda x: put(x, everyones), tree)

    return Batch(
        rows=put_own(batch.rows),
        scored=ScoredTokens(
            positions=put_own(batch.scored.positions),
            targets=put_own(batch.scored.targets),
            counts=put_everyones(batch.scored.counts),
        ),
        pairs=put_everyones(batch.pairs),
    )


def abstract_batch(
    shape: tuple[int, int],
    grid: tuple[int, int, int],
    mesh: Mesh,
    with_ref_logps: bool = False,
    arrangement: Arrangement = PADDED,
) -> Batch:
    """The batches of one `shape` (S, T), to compile for; `grid` is A, N and P."""
    (S, T), (A, N, pairs) = shape, grid

    def array(*size: int, dtype: Any = np.int32) -> Any:
        return jax.ShapeDtypeStruct(size, dtype, sharding=place(_BY_SHARD, mesh))

    rows = A, N * arrangement.rows(pairs), S
    spans = KeySpans(*(array(*rows) for _ in range(3)))
    return Batch(
        rows=ModelRows(
            tokens=array(*rows), spans=spans if arrangement.with_spans else None
        ),
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
