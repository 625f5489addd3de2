"""Which arrays a run is made of: those that change are saved, the others compared."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from engine.models import Decoder
from engine.objective.references import Reference, SyncedModel, shares_arrays
from engine.parallel.sharding import whole
from engine.training.checkpointing import Identity
from engine.training.continuation import configuration
from engine.training.fingerprint import fingerprint
from engine.training.gradients import Params
from engine.training.identity import checksum_of_arrays
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
    return Identity(configuration(run, config), checksum_of_arrays(fixed))


def starts_as_reference(
    run: Prepared, policy: Decoder, reference: Decoder | None
) -> bool:
    """Whether the first step measures the policy from the same weights.

    That is so where no reference was given, where it is the base of an adapter that has
    learnt nothing, whose B is 0, and where it was read from another place and has the
    same weights. An adapter that has learnt drops elements of its input in training, if
    it is to, which a reference never does.
    """
    if run.arguments.without_reference or run.brings_values:
        return False
    adapter, learnt = policy.config.adapter, _has_learnt(policy)
    if adapter is not None and adapter.dropout and learnt:
        return False
    if reference is None:
        return True
    if adapter is not None and reference.config.adapter is None:
        return not learnt and shares_arrays(reference, policy)
    return _same_weights(policy, reference)


def _has_learnt(policy: Decoder) -> bool:
    """Whether the policy is an adapter that adds something to its base."""
    return any(
        jax.jit(jnp.any, out_shardings=whole(x.get_value()))(x.get_value())
        for path, x in policy.variables().items()
        if str(path[-1]).endswith("_lora_b")
    )


def _same_weights(policy: Decoder, reference: Decoder) -> bool:
    """Whether two models compute the same, of which each has arrays of its own."""
    if policy.config != reference.config or policy.dtype != reference.dtype:
        return False
    return fingerprint(policy) == fingerprint(reference)
