"""Which arrays a run is made of: those that change are saved, the others compared."""

from collections.abc import Mapping
from typing import Any

import jax

from engine.data.pair_streams import PairStream
from engine.objective.references import Reference, SyncedModel
from engine.training.checkpointing import Identity
from engine.training.gradients import Params
from engine.training.identity import checksum_of_arrays, checksum_of_pairs, flat
from engine.training.prepare import Prepared
from engine.training.step import TrainState


def abstract_arrays(tree: Any) -> Any:
    """Shapes, dtypes and shardings."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def changing(state: TrainState, reference: Reference) -> dict[str, Any]:
    """Every array that training changes. A state may be abstract, and then all is."""
    synced = reference.operands if isinstance(reference, SyncedModel) else ()
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state)):
        synced = abstract_arrays(synced)
    return {"state": state, "reference": synced}


def take_back(found: Mapping[str, Any], reference: Reference) -> TrainState:
    """The state that was saved; a synced reference is again what it was."""
    if isinstance(reference, SyncedModel):
        reference.operands = found["reference"]
    return found["state"]


def identity(
    run: Prepared, config: Mapping[str, Any], frozen: Params, reference: Reference
) -> Identity:
    """What a run must have in common with the one that it goes on with.

    config: what of it is not in `run.arguments`.
    """
    fixed: list[Any] = [frozen]
    if not isinstance(reference, SyncedModel):
        fixed.append(reference.operands)
    # Of a stream the first rows must do: the rest has not been read.
    pairs = run.train.head[1] if isinstance(run.train, PairStream) else run.train
    data = {"data": checksum_of_pairs(pairs)}
    values = flat(run.arguments, "trainer") | dict(config) | data
    return Identity(values, checksum_of_arrays(fixed))
