"""What a Hugging Face `config.json` says about a decoder, checked and made static."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import InputError, shown
from engine.models.architecture import FULL, SLIDING, DecoderConfig
from engine.models.rope import parse_rope
from engine.models.values import flag, integer, number

logger = logging.getLogger(__name__)

_MOST_LAYERS = 10_000  # each has entries in tables; real models have some hundred
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets one `model_type` apart; the defaults are transformers' own."""

    causal_lm: str  # the class that `architectures` names
    gemma: bool = False  # (1 + w) norms, scaled embeddings, norms after the blocks
    qkv_bias: bool = False  # always there, whatever `attention_bias` says
    reads_attention_bias: bool = True
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    kv_heads: int | None = None  # None: as many as query heads
    positions: int = 2048  # max_position_embeddings, where config.json has none
    attn_softcap: float | None = None
    final_softcap: float | None = None


FAMILIES = {
    "llama": Family(causal_lm="LlamaForCausalLM", reads_mlp_bias=True),
    "mistral": Family(
        causal_lm="MistralForCausalLM",
        reads_attention_bias=False,
        kv_heads=8,
        positions=131072,
    ),
    "qwen2": Family(
        causal_lm="Qwen2ForCausalLM",
        qkv_bias=True,
        reads_attention_bias=False,
        kv_heads=32,
        positions=32768,
    ),
    "qwen3": Family(
        causal_lm="Qwen3ForCausalLM",
        qk_norm=True,
        head_dim=128,
        kv_heads=32,
        positions=32768,
    ),
    "gemma2": Family(
        causal_lm="Gemma2ForCausalLM",
        gemma=True,
        head_dim=256,
        kv_heads=4,
        positions=8192,
        attn_softcap=50.0,
        final_softcap=30.0,
    ),
    "gemma3_text": Family(
        causal_lm="Gemma3ForCausalLM",
        gemma=True,
        qk_norm=True,
        head_dim=256,
        kv_heads=4,
        positions=131072,
    ),
}

# Keys that change the maths of some model in transformers, and the values that leave a
# plain decoder as it is. Any other key is one that transformers itself ignores here, or
# that matters in training only: dropout, which a preference run turns off.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (),
    "compression_config": (),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "attention_multiplier": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "clip_qkv": (),
    "attention_chunk_size": (),
    "attn_temperature_tuning": (False, 0),
    "no_rope_layers": ([],),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
}


def _own_code(values: Mapping[str, Any]) -> str:
    """Why a checkpoint with Python files of its own cannot be had."""
    if not values.get("auto_map"):
        return ""
    return " (its auto_map names code that comes with it, which is never run)"


def _refuse_foreign(values: Mapping[str, Any], model_type: str, family: Family) -> None:
    """Raises for every option that would change the maths and is not implemented."""
    for key, neutral in _NEUTRAL.items():
        value = values.get(key)
        if value is not None and value not in neutral:
            allowed = " or ".join(map(repr, (*neutral, None)))
            raise InputError(
                f"config.json: {key}={value!r} is not supported for model_type "
                f"{model_type!r}; allowed: {allowed}"
            )
    architectures = values.get("architectures") or [family.causal_lm]
    if not isinstance(architectures, list):
        raise InputError(
            f"config.json: architectures={shown(architectures)} must be a list of names"
        )
    if family.causal_lm not in architectures:
        raise InputError(
            f"config.json: architectures={architectures} is not supported; model_type "
            f"{model_type!r} needs a {family.causal_lm} checkpoint{_own_code(values)}"
        )
    for key, read in (
        ("attention_bias", family.reads_attention_bias or family.qkv_bias),
        ("mlp_bias", family.reads_mlp_bias),
    ):
        if not read and values.get(key):
            raise InputError(
                f"config.json: {key}={values[key]!r} is not an option of model_type "
                f"{model_type!r}; remove it"
            )
    if model_type == "gemma3_text" and values.get("attn_logit_softcapping") is not None:
        raise InputError(
            "config.json: attn_logit_softcapping="
            f"{values['attn_logit_softcapping']!r} is not supported for gemma3_text "
            "(transformers ignores it); set it to null"
        )


def _layer_types(
    values: Mapping[str, Any], model_type: str, layers: int
) -> tuple[tuple[str, ...], int | None]:
    """Each layer's attention, and the window of the sliding ones."""
    every: tuple[str, ...]
    window: int | None = None
    if model_type == "llama":
        if values.get("sliding_window") is not None:
            raise InputError(
                f"config.json: sliding_window={values['sliding_window']!r} is not an "
                "option of model_type 'llama'; use 'mistral', or remove it"
            )
        every = (FULL,) * layers
    elif model_type == "mistral":
        window = None if values.get("sliding_window", 4096) is None else 4096
        every = (FULL if window is None else SLIDING,) * layers
    elif model_type in ("qwen2", "qwen3"):
        first = values.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise InputError(
                f"config.json: max_window_layers={shown(first)} must be an integer"
            )
        if flag(values, "use_sliding_window", False):
            window = 4096 if values.get("sliding_window", 4096) is not None else None
        used = window is not None
        every = tuple(SLIDING if used and i >= first else FULL for i in range(layers))
    else:
        window = 4096
        period = 2
        if model_type == "gemma3_text":
            period = integer(values, "sliding_window_pattern", 6)
        every = tuple(FULL if (i + 1) % period == 0 else SLIDING for i in range(layers))
    if window is not None:
        window = integer(values, "sliding_window", window)

    named = values.get("layer_types")
    if named is not None:
        if not isinstance(named, list):
            raise InputError(f"config.json: layer_types={named!r} must be a list")
        if model_type in ("llama", "mistral") and tuple(named) != every:
            raise InputError(
                f"config.json: layer_types={named} is not an option of model_type "
                f"{model_type!r}; its layers are all {every[0]}"
            )
        every = tuple(map(str, named))
    bad = sorted(set(every) - {FULL, SLIDING})
    if bad or len(every) != layers:
        raise InputError(
            f"config.json: layer_types has {len(every)} entries of kinds "
            f"{sorted(set(every))}; allowed: {layers} of {FULL} or {SLIDING}"
        )
    if SLIDING in every and window is None:
        raise InputError(
            f"config.json: layer_types names {SLIDING} but no sliding_window is set; "
            "set sliding_window (and use_sliding_window for qwen2 and qwen3)"
        )
    return every, window if SLIDING in every else None


def _heads(values: Mapping[str, Any], family: Family) -> tuple[int, int, int]:
    """Query heads, kv heads, head dim."""
    hidden = integer(values, "hidden_size")
    heads = integer(values, "num_attention_heads")
    absent = "num_key_value_heads" not in values and family.kv_heads
    kv_heads = integer(values, "num_key_value_heads", absent or heads)
    if heads % kv_heads:
        raise InputError(
            f"config.json: num_attention_heads={heads} must be a multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    head_dim = None if "head_dim" in values else family.head_dim
    if head_dim is None and values.get("head_dim") is None and hidden % heads:
        raise InputError(
            f"config.json: hidden_size={hidden} is no multiple of num_attention_heads="
            f"{heads}; set head_dim"
        )
    head_dim = integer(values, "head_dim", head_dim or hidden // heads)
    if head_dim % 2:
        raise InputError(
            f"config.json: head_dim={head_dim} must be even (rotary planes)"
        )
    return heads, kv_heads, head_dim


def _activation(values: Mapping[str, Any], gemma: bool) -> str:
    # gemma's `hidden_act` is a leftover that transformers ignores
    key = "hidden_activation" if gemma else "hidden_act"
    name = values.get(key, "gelu_pytorch_tanh" if gemma else "silu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise InputError(
            f"config.json: {key} {shown(name)} is not supported; allowed: "
            f"{', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def parse_hf_config(values: dict[str, Any]) -> DecoderConfig:
    """The decoder that `config.json` describes, as transformers 4 and 5 write it.

    Raises:
        InputError: an architecture or an option that is not implemented, by name.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"config.json: model_type {model_type!r} is not supported; allowed: "
            f"{', '.join(FAMILIES)}{_own_code(values)}"
        )
    family = FAMILIES[model_type]
    _refuse_foreign(values, model_type, family)
    if values.get("auto_map"):
        logger.warning(
            "config.json: auto_map=%s names code that comes with the checkpoint, which "
            "is never run; it is read as the %s that transformers has",
            values["auto_map"],
            family.causal_lm,
        )
    layers = integer(values, "num_hidden_layers", most=_MOST_LAYERS)
    layer_types, window = _layer_types(values, model_type, layers)
    heads, kv_heads, head_dim = _heads(values, family)
    hidden = integer(values, "hidden_size")
    max_position = integer(values, "max_position_embeddings", family.positions)
    bias = family.reads_attention_bias and flag(values, "attention_bias", False)
    gemma = family.gemma
    scalar: float | None = head_dim
    cap = final_cap = None
    if gemma:
        scalar = number(values, "query_pre_attn_scalar", 256)
        cap = number(values, "attn_logit_softcapping", family.attn_softcap)
        final_cap = number(values, "final_logit_softcapping", family.final_softcap)
    return DecoderConfig(
        model_type=model_type,
        vocab_size=integer(values, "vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=integer(values, "intermediate_size"),
        activation=_activation(values, gemma),
        rms_eps=number(values, "rms_norm_eps", 1e-6) or 1e-6,
        tie_word_embeddings=flag(values, "tie_word_embeddings", gemma),
        max_position=max_position,
        layer_types=layer_types,
        sliding_window=window,
        ropes=parse_rope(values, layer_types, max_position, model_type),
        query_scale=(scalar or head_dim) ** -0.5,
        attn_softcap=cap,
        final_softcap=final_cap,
        qkv_bias=family.qkv_bias or bias,
        o_bias=bias,
        mlp_bias=family.reads_mlp_bias and flag(values, "mlp_bias", False),
        qk_norm=family.qk_norm,
        gemma=gemma,
        embed_scale=float(hidden) ** 0.5 if gemma else 1.0,
        initializer_range=number(values, "initializer_range", 0.02) or 0.02,
        source=json.dumps(values),
    )
