"""Where the reference's log-probabilities come from: a frozen model, or nowhere."""

import jax
import jax.numpy as jnp
from flax import nnx

from engine.errors import InputError
from engine.models import Decoder


def make_reference(
    policy: Decoder,
    given: Decoder | None,
    *,
    reference_free: bool = False,
    synced: bool = False,
) -> Decoder | None:
    """The model that rewards are measured from; None when reference-free.

    It owns its arrays: the policy's are donated to the training step. They are kept in
    the compute dtype, since every use starts with that cast, unless the reference
    follows the policy: small updates would be lost in bfloat16.

    Raises:
        InputError: a given model that cannot be compared with the policy.
    """
    if reference_free:
        if given is not None:
            raise InputError(
                "reference_model has no effect with reference_free=True; remove one"
            )
        return None
    source = policy if given is None else given
    if given is not None:
        _check_comparable(policy, given, synced)
    graphdef, params = nnx.split(source, nnx.Param)

    def own(x: jax.Array) -> jax.Array:
        if synced or x.dtype == source.dtype:
            return jnp.copy(x)
        return x.astype(source.dtype)

    return nnx.merge(graphdef, jax.tree.map(own, params))


def _check_comparable(policy: Decoder, reference: Decoder, synced: bool) -> None:
    if reference.mesh != policy.mesh:
        raise InputError(
            f"reference_model lies on the mesh {reference.mesh.shape} and model on "
            f"{policy.mesh.shape}; load both with the same mesh"
        )
    ours, theirs = policy.config.vocab_size, reference.config.vocab_size
    if ours != theirs:
        raise InputError(
            f"reference_model has a vocabulary of {theirs} and model one of {ours}; "
            "both must use the same tokenizer: give another reference_model"
        )
    if not synced:
        return
    shapes = [
        {path: one.shape for path, one in model.config.parameters().items()}
        for model in (policy, reference)
    ]
    if policy.config.num_layers != reference.config.num_layers or (
        shapes[0] != shapes[1]
    ):
        raise InputError(
            "sync_ref_model=True mixes model into reference_model, so both must have "
            "the same architecture; give another reference_model, or none"
        )


def sync_reference[Params](ref_params: Params, params: Params, alpha: float) -> Params:
    """alpha * policy + (1 - alpha) * reference, in the reference's dtype."""

    def mix(ref: jax.Array, policy: jax.Array) -> jax.Array:
        mixed = alpha * policy.astype(jnp.float32)
        mixed += (1 - alpha) * ref.astype(jnp.float32)
        return mixed.astype(ref.dtype)

    return jax.tree.map(mix, ref_params, params)
