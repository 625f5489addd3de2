"""Which reference a run measures from, of the models that it was given."""

from engine.config.dpo import DPOConfig
from engine.models import Decoder, with_own_adapter
from engine.objective.references import (
    FrozenModel,
    NoReference,
    Reference,
    SharedModel,
    SyncedModel,
    model_for_reference,
    refuse_to_offload_a_base,
    shares_arrays,
)


def make_reference(
    policy: Decoder, given: Decoder | None, arguments: DPOConfig
) -> Reference:
    """Where the reference's log-probabilities come from."""
    if arguments.without_reference:
        return NoReference()
    shared = _shared(policy, given)
    if shared is not None:
        if arguments.offload_ref_model:
            refuse_to_offload_a_base()
        return shared
    synced = arguments.sync_ref_model
    offload = arguments.offload_ref_model
    model = model_for_reference(policy, given, synced=synced, offload=offload)
    if not synced:
        return FrozenModel(model)
    return SyncedModel(
        model,
        policy,
        every=arguments.ref_model_sync_steps,
        alpha=arguments.ref_model_mixup_alpha,
    )


def _shared(policy: Decoder, given: Decoder | None) -> SharedModel | None:
    """The reference where it is on the base of the policy's adapter, or None.

    given: None is the policy as it is now, of whose adapter there is a copy then.
    """
    if policy.config.adapter is None:
        return None
    given = with_own_adapter(policy) if given is None else given
    return SharedModel(given, policy) if shares_arrays(given, policy) else None
