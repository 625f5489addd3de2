"""PEFT's files of a LoRA adapter: what may be in them, and what is written."""

import logging
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from engine.errors import InputError, shown, stage
from engine.models.adapter import LINEARS, Adapter
from engine.models.architecture import DecoderConfig
from engine.models.checkpoint import (
    ADAPTER_CONFIG,
    listed,
    read_json,
    refuse_dangling_link,
)
from engine.models.reader import Reader
from engine.models.tensors import check_shapes
from engine.models.values import A_NUMBER, flag, integer, is_positive

logger = logging.getLogger(__name__)

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # before the names of a checkpoint, in PEFT's files

# What the other options must be for this program to compute the same. Options of which
# nothing is known are taken for such that change what is computed, once they are set.
_NONE: tuple[Any, ...] = (None, False, {}, [], "")
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    # Others change the base's weights, or what of the adapter is trained.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_WITHOUT_EFFECT = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision "
    "inference_mode lora_dropout r lora_alpha use_rslora target_modules runtime_config "
    "layers_pattern megatron_core qalora_group_size eva_config ensure_weight_tying"
    "".split()
)


def adapter_config(adapter: Adapter) -> dict[str, Any]:
    """`adapter_config.json` as PEFT reads it."""
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "target_modules": list(adapter.modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
    }


def adapter_name(hf_name: str) -> str:
    """The name of an adapter's tensor in PEFT's file."""
    return PREFIX + hf_name


def read_adapter_config(directory: Path, config: DecoderConfig) -> Adapter:
    """What `adapter_config.json` says of an adapter for the decoder of `config`.

    Raises:
        InputError: not LoRA; a value that is wrong; an option of PEFT's that changes
            what is computed, or trained, and is not implemented here.
    """
    where = directory / ADAPTER_CONFIG
    values = read_json(where)
    try:
        adapter = _parsed(values, config)
    except InputError as error:
        said = str(error).replace("config.json: ", "")
        raise InputError(f"{where}: {said}") from error
    return adapter


def _parsed(values: Mapping[str, Any], config: DecoderConfig) -> Adapter:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise InputError(f"peft_type={shown(kind)} is not supported; allowed: LORA")
    for name, value in values.items():
        allowed = _ALLOWED.get(name, _NONE)
        if name not in _WITHOUT_EFFECT and value not in allowed:
            raise InputError(
                f"{name}={shown(value)} is not supported, as it changes what the "
                "adapter computes; merge the adapter into its model with peft "
                "(merge_and_unload, save_pretrained), and give that as the model"
            )
    alpha = values.get("lora_alpha", 8)
    if not is_positive(alpha):
        raise InputError(f"lora_alpha={shown(alpha)} must be {A_NUMBER}")
    base = values.get("base_model_name_or_path")
    return Adapter(
        rank=integer(values, "r", 8),
        alpha=float(alpha),
        modules=_modules(values.get("target_modules"), config),
        rslora=flag(values, "use_rslora", False),
        base=base if isinstance(base, str) else None,
    )


def _modules(targets: Any, config: DecoderConfig) -> tuple[str, ...]:
    """The linear modules that PEFT's `target_modules` selects, by its own rules."""
    if targets == "all-linear":
        return tuple(LINEARS)
    is_list = isinstance(targets, list) and all(isinstance(x, str) for x in targets)
    if not targets or not (is_list or isinstance(targets, str)):
        raise InputError(
            f"target_modules={shown(targets)} must be a list of modules' names, a "
            "pattern, or all-linear"
        )

    def is_target(key: str) -> bool:
        if isinstance(targets, str):
            with stage(f"target_modules={shown(targets)} is no pattern"):
                return re.fullmatch(targets, key) is not None
        return key in targets or any(key.endswith(f".{x}") for x in targets)

    table = config.parameters()
    found: list[str] = []
    for module, name in LINEARS.items():
        hf_name = table["layers", name].hf_name.removesuffix(".weight")
        hits = [is_target(hf_name.format(i)) for i in range(config.num_layers)]
        if any(hits) and not all(hits):
            raise InputError(
                f"target_modules={shown(targets)} selects {module} in "
                f"{sum(hits)} of {len(hits)} layers; an adapter is in all or in none"
            )
        found += [module] if all(hits) else []
    if is_list:
        foreign = [x for x in targets if x.split(".")[-1] not in LINEARS]
    else:
        foreign = [x for x in ("lm_head", "model.embed_tokens") if is_target(x)]
    if foreign or not found:
        raise InputError(
            f"target_modules={shown(targets)} selects {listed(foreign) or 'nothing'}, "
            f"which can have no adapter here; allowed: {', '.join(LINEARS)}"
        )
    return tuple(found)


def _adapter_weights(directory: Path) -> tuple[list[Path], dict[str, str]]:
    path = directory / ADAPTER_WEIGHTS
    refuse_dangling_link(path)
    if path.is_file():
        return [path], {}
    hint = "fetch the adapter again"
    if (directory / "adapter_model.bin").is_file():
        hint = (
            "adapter_model.bin is pickled, which runs code when it is read, so it is "
            "not; save the adapter anew with peft's save_pretrained"
        )
    raise InputError(f"{directory}: no {ADAPTER_WEIGHTS}; {hint}")


def open_adapter(
    directory: Path, config: DecoderConfig, stack: ExitStack
) -> tuple[Adapter, Reader]:
    """An adapter, and a reader of its tensors by the names that a checkpoint has.

    Raises:
        InputError: see `read_adapter_config`; tensors that do not fit the decoder.
    """
    adapter = read_adapter_config(directory, config)
    reader = Reader(directory, stack, _adapter_weights)
    for name in list(reader.shapes()):
        if name.startswith(PREFIX):
            reader.alias(name.removeprefix(PREFIX), name)
    expected = {
        param.hf_name.format(layer): param.shape
        for param in replace(config, adapter=adapter).parameters().values()
        if param.trainable
        for layer in range(config.num_layers)
    }
    check_shapes(
        expected,
        reader.shapes(),
        f"{directory}: tensors do not match {ADAPTER_CONFIG} and the model "
        f"({config.model_type})",
    )
    dtypes = set(reader.dtypes().values())
    return replace(adapter, dtype=max(dtypes)), reader


def check_adapter(directory: Path, config: DecoderConfig, base: str | None) -> Adapter:
    """The adapter of a directory, if it fits the model; reads no weights.

    base: how the model is named, to be compared with what the adapter was made for.
    """
    with ExitStack() as stack:
        adapter, _ = open_adapter(directory, config, stack)
    made_for = adapter.base
    if base and made_for and PurePath(base).name != PurePath(made_for).name:
        logger.warning(
            "%s: was made for %s, and is put on %s", directory, made_for, base
        )
    return adapter
