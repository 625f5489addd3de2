"""The static facts of a decoder, and the parameters that follow from them."""

import json
from dataclasses import dataclass, field
from typing import Any

from engine.models.rope import Rope
from engine.parallel.sharding import ModelShape, Parameter, Path, Role

SLIDING, FULL = "sliding_attention", "full_attention"  # as config.json names them


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelShape):
    """Static facts of one decoder; made by `families.parse_hf_config`."""

    model_type: str
    head_dim: int
    activation: str  # a value of ACTIVATIONS
    rms_eps: float
    tie_word_embeddings: bool
    max_position: int
    layer_types: tuple[str, ...]  # per layer: FULL or SLIDING
    sliding_window: int | None  # keys that a query of a SLIDING layer sees, itself too
    ropes: tuple[Rope, ...]  # per layer
    query_scale: float
    attn_softcap: float | None
    final_softcap: float | None
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    gemma: bool  # norms scale by (1 + w) in float32, and also follow both blocks
    embed_scale: float
    initializer_range: float
    source: str = field(repr=False, compare=False)  # config.json as read, as JSON

    @property
    def hf_config(self) -> dict[str, Any]:
        """`config.json` as it was read."""
        return json.loads(self.source)

    def parameters(self) -> dict[Path, Parameter]:
        """Every parameter by its path in the module, in the order of the layers."""
        vocab = (self.vocab_size, self.hidden_size)

        def single(
            hf_name: str, shape: tuple[int, ...], role: Role, norm: bool = False
        ):
            return Parameter(
                hf_name=hf_name, shape=shape, role=role, stacked=False, norm=norm
            )

        found: dict[Path, Parameter] = {}
        found[("embed",)] = single("model.embed_tokens.weight", vocab, Role.VOCAB)
        for name, parameter in _layer_parameters(self).items():
            found["layers", name] = parameter
        final = single("model.norm.weight", vocab[1:], Role.REPLICATED, norm=True)
        found[("final_norm",)] = final
        if not self.tie_word_embeddings:
            found[("head",)] = single("lm_head.weight", vocab, Role.VOCAB)
        return found


def _layer_parameters(config: DecoderConfig) -> dict[str, Parameter]:
    d, f, h = config.hidden_size, config.ffn_size, config.head_dim
    q, kv = config.num_heads * h, config.num_kv_heads * h
    found: dict[str, Parameter] = {}

    def add(
        name: str, hf_name: str, shape: tuple[int, ...], role: Role, norm: bool = False
    ):
        hf_name = "model.layers.{}." + hf_name
        found[name] = Parameter(
            hf_name=hf_name, shape=shape, role=role, stacked=True, norm=norm
        )

    def linear(
        name: str, module: str, out: int, size: int, role: Role, bias: Role | None
    ):
        add(name, module + ".weight", (out, size), role)
        if bias is not None:
            add(name + "_bias", module + ".bias", (out,), bias)

    def norm(name: str, module: str, size: int):
        add(name, module + ".weight", (size,), Role.REPLICATED, norm=True)

    qkv = config.qkv_bias
    linear(
        "q", "self_attn.q_proj", q, d, Role.COLUMN, Role.COLUMN_BIAS if qkv else None
    )
    kv_bias = Role.KV_COLUMN_BIAS if qkv else None
    linear("k", "self_attn.k_proj", kv, d, Role.KV_COLUMN, kv_bias)
    linear("v", "self_attn.v_proj", kv, d, Role.KV_COLUMN, kv_bias)
    o_bias = Role.REPLICATED if config.o_bias else None
    linear("o", "self_attn.o_proj", d, q, Role.ROW, o_bias)
    mlp_bias = Role.COLUMN_BIAS if config.mlp_bias else None
    linear("gate", "mlp.gate_proj", f, d, Role.COLUMN, mlp_bias)
    linear("up", "mlp.up_proj", f, d, Role.COLUMN, mlp_bias)
    down_bias = Role.REPLICATED if config.mlp_bias else None
    linear("down", "mlp.down_proj", d, f, Role.ROW, down_bias)
    norm("attn_norm", "input_layernorm", d)
    if config.gemma:
        norm("attn_post_norm", "post_attention_layernorm", d)
        norm("mlp_norm", "pre_feedforward_layernorm", d)
        norm("mlp_post_norm", "post_feedforward_layernorm", d)
    else:
        norm("mlp_norm", "post_attention_layernorm", d)
    if config.qk_norm:
        norm("q_norm", "self_attn.q_norm", h)
        norm("k_norm", "self_attn.k_norm", h)
    return found
