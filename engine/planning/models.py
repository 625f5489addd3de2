"""The models of a run as shapes, from their config.json alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from engine.config.run import RunConfig
from engine.models import (
    Decoder,
    DecoderConfig,
    abstract_model,
    check_adapter,
    check_checkpoint,
    read_config,
    resolve_directory,
    without_adapter,
)
from engine.models.adapters import decoder_like
from engine.models.architecture import Origin
from engine.models.init import placed_parameters, stored_dtype
from engine.training.lora import named_reference, reference_decoder, with_lora


def with_local_models(run: RunConfig) -> RunConfig:
    """The run with each model's directory for its name; no weight is downloaded.

    Raises:
        InputError: a model that is not there.
    """

    def local(name: str | None) -> str | None:
        return None if name is None else str(resolve_directory(name, weights=False))

    reference = run.reference_model
    if reference is not None:
        reference = replace(reference, name_or_path=local(reference.name_or_path))
    name = local(run.model.name_or_path)
    assert name is not None
    model = replace(
        run.model, name_or_path=name, tokenizer=local(run.model.tokenizer) or name
    )
    return replace(run, model=model, reference_model=reference)


def model_config(directory: str | Path) -> DecoderConfig:
    """What config.json says; compared with the weights, where these are there.

    Raises:
        InputError: a model that training would refuse.
    """
    directory = Path(directory)
    if any(directory.glob("*.safetensors")):
        return check_checkpoint(directory)
    return replace(
        read_config(directory), origin=Origin(directory=directory, dtypes={})
    )


def model_configs(run: RunConfig) -> tuple[DecoderConfig, DecoderConfig | None]:
    """The policy's with its adapter, and a named reference's; see `with_local_models`.

    Raises:
        InputError: models and adapters that training would refuse.
    """
    base = model_config(run.model.name_or_path)
    reference = named_reference(run, base, model_config)
    return with_lora(base, run.lora, run.model.name_or_path), reference


def abstract_models(
    run: RunConfig, config: DecoderConfig, mesh: Mesh
) -> tuple[Decoder, Decoder | None]:
    """The policy and the reference that it is given, as `dpo train` loads them.

    Args:
        config: the policy's, with its adapter.
    """
    options = run.model
    policy = abstract_model(
        config,
        mesh=mesh,
        dtype=options.dtype,
        param_dtype=options.param_dtype,
        remat=options.remat,
        reduce_dtype=options.reduce_dtype,
        mlp_tile=options.mlp_tile,
    )
    base, reference, given = policy, None, run.reference_model
    if run.lora is not None:
        base = without_adapter(policy)
        reference = base if run.lora.adapter is None else None
    if given is not None:
        reference = reference_decoder(
            policy,
            base,
            name=given.name_or_path,
            adapter=given.adapter,
            synced=run.trainer.sync_ref_model,
            dtype=given.dtype,
            load=_abstract_reference,
            adapt=_abstract_adapter,
        )
    return policy, reference


def _abstract_reference(
    name: str | Path, policy: Decoder, *, synced: bool, dtype: str | None = None
) -> Decoder:
    """As `load_reference`, in shapes."""
    dtype = dtype or policy.dtype.name
    return abstract_model(
        model_config(name),
        mesh=policy.mesh,
        dtype=dtype,
        param_dtype="float32" if synced else dtype,
        remat=policy.remat,
    )


def _abstract_adapter(model: Decoder, directory: str, *, what: str) -> Decoder:
    """As `load_adapter`, in shapes."""
    adapter = check_adapter(resolve_directory(directory, what), model.config, None)
    config = replace(model.config, adapter=adapter)
    arrays: dict[Any, Any] = {
        path: x.get_value() for path, x in model.variables().items()
    }
    for path, param, shape, sharding in placed_parameters(config, model.mesh):
        if param.trainable:
            arrays[path] = jax.ShapeDtypeStruct(
                shape, stored_dtype("float32"), sharding=sharding
            )
    return decoder_like(model, config, arrays)
