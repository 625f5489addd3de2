"""LoRA's part of a run: the policy on its frozen base, and references that share it."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from engine.config.lora import LoraConfig
from engine.config.run import RunConfig
from engine.models import (
    Adapter,
    Decoder,
    DecoderConfig,
    add_adapter,
    check_adapter,
    load_adapter,
    resolve_directory,
)
from engine.objective.references import load_reference

_REFERENCES = "reference_model.adapter"


def with_lora(
    config: DecoderConfig, lora: LoraConfig | None, base: str | None
) -> DecoderConfig:
    """The policy's configuration on a base model's; `base`: how that is named.

    Raises:
        InputError: an adapter that does not fit, see `check_adapter`.
    """
    if lora is None:
        return config
    return replace(config, adapter=_adapter(lora, config, base))


def _adapter(lora: LoraConfig, config: DecoderConfig, base: str | None) -> Adapter:
    if lora.adapter is None:
        return lora.new_adapter(base)
    directory = resolve_directory(lora.adapter, "lora.adapter")
    found = check_adapter(directory, config, base)
    return replace(found, dropout=lora.lora_dropout, base=base or found.base)


def named_reference(
    run: RunConfig, base: DecoderConfig, read: Callable[[str], DecoderConfig]
) -> DecoderConfig | None:
    """The configuration of the reference that a run file names; None: it names none.

    Args:
        base: that of the policy's base, which an adapter alone is on.
        read: gives that of a model by its name.
    """
    given = run.reference_model
    if given is None:
        return None
    config = base if given.name_or_path is None else read(given.name_or_path)
    name = given.name_or_path or run.model.name_or_path
    return reference_config(config, given.adapter, name)


def lora_policy(
    base: Decoder,
    lora: LoraConfig,
    adapter: Adapter,
    *,
    param_dtype: str = "float32",
    seed: int,
) -> Decoder:
    """The policy: `base`, whose arrays it shares, and the adapter that is trained."""
    if lora.adapter is None:
        return add_adapter(base, adapter, param_dtype=param_dtype, seed=seed)
    return load_adapter(base, lora.adapter, adapter=adapter, param_dtype=param_dtype)


def reference_config(
    config: DecoderConfig, adapter: str | None, base: str | None
) -> DecoderConfig:
    """A reference's configuration, with the adapter that it has, if any."""
    if adapter is None:
        return config
    directory = resolve_directory(adapter, _REFERENCES)
    return replace(config, adapter=check_adapter(directory, config, base))


def reference_decoder(
    policy: Decoder,
    base: Decoder,
    *,
    name: str | Path | None,
    adapter: str | None,
    synced: bool,
    dtype: str | None = None,
    load: Callable[..., Decoder] = load_reference,
    adapt: Callable[..., Decoder] = load_adapter,
) -> Decoder | None:
    """The reference that a run names; None: the policy as it is before training.

    Where the policy is an adapter on `base`, and `name` is that very model or None, its
    arrays are shared, unless the reference computes in another dtype.

    Args:
        load: makes a model of a name, and `adapt` puts an adapter on it.
    """
    if name is None and adapter is None:
        return None
    same = dtype in (None, base.dtype.name)
    if name is None and not same and base.config.origin is not None:
        name = base.config.origin.directory
    if name is None or (same and policy is not base and _is_from(base, name)):
        reference = base
    else:
        reference = load(name, policy, synced=synced, dtype=dtype)
    if adapter is None:
        return reference
    return adapt(reference, adapter, what=_REFERENCES)


def _is_from(model: Decoder, name: str | Path) -> bool:
    """Whether a model was read from the checkpoint of that name."""
    origin = model.config.origin
    directory = resolve_directory(name)
    return origin is not None and os.path.samefile(origin.directory, directory)
