"""The static facts of a decoder, and the parameters that follow from them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.models.adapter import LINEARS, Adapter
from engine.models.rope import Rope
from engine.parallel.sharding import Parameter, ParameterPath, Role

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # names on disk
SLIDING, FULL = "sliding_attention", "full_attention"  # as config.json names them


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint that weights were read from, for who writes them again."""

    directory: Path
    dtypes: Mapping[str, str]  # of each tensor there, by its name: bfloat16, ...


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Static facts of one decoder; made by `families.parse_hf_config`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
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
    # None: the weights come from no checkpoint.
    origin: Origin | None = field(default=None, repr=False, compare=False)
    adapter: Adapter | None = None  # where there is one, it alone is trained

    @property
    def hf_config(self) -> dict[str, Any]:
        """`config.json` as it was read."""
        return json.loads(self.source)

    @property
    def window_of_layer(self) -> tuple[int | None, ...]:
        """How many keys a query of each layer sees, itself too; None: all before it."""
        return tuple(
            self.sliding_window if kind == SLIDING else None
            for kind in self.layer_types
        )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Those that there are, each once."""
        return tuple(dict.fromkeys(self.window_of_layer))

    def untied(self) -> "DecoderConfig":
        """The same decoder with a head of its own."""
        source = json.dumps(self.hf_config | {"tie_word_embeddings": False})
        return replace(self, tie_word_embeddings=False, source=source)

    def parameters(self) -> dict[ParameterPath, Parameter]:
        """Every parameter by its path in the module, in the order of the layers."""
        vocab = (self.vocab_size, self.hidden_size)

        def single(
            hf_name: str, shape: tuple[int, ...], role: Role, norm: bool = False
        ):
            return Parameter(
                hf_name=hf_name, shape=shape, role=role, stacked=False, norm=norm
            )

        table: dict[ParameterPath, Parameter] = {}
        table[("embed",)] = single(EMBEDDING, vocab, Role.VOCAB)
        for name, parameter in _layer_parameters(self).items():
            table["layers", name] = parameter
        final = single("model.norm.weight", vocab[1:], Role.REPLICATED, norm=True)
        table[("final_norm",)] = final
        if not self.tie_word_embeddings:
            table[("head",)] = single(HEAD, vocab, Role.VOCAB)
        return table if self.adapter is None else _adapted(table, self.adapter)


def max_positions(config: DecoderConfig) -> int:
    """The longest sequence, in tokens, that the model was made for."""
    return config.max_position


_ADAPTER_ROLES = {  # of A and of B, by the role of the weight that they stand beside
    Role.COLUMN: (Role.COLUMN_A, Role.COLUMN_B),
    Role.KV_COLUMN: (Role.COLUMN_A, Role.KV_COLUMN_B),
    Role.ROW: (Role.ROW_A, Role.ROW_B),
}


def _adapted(
    base: Mapping[ParameterPath, Parameter], adapter: Adapter
) -> dict[ParameterPath, Parameter]:
    """The parameters of a frozen base, and those of its adapter behind them."""
    table = {path: replace(param, trainable=False) for path, param in base.items()}
    for module in adapter.modules:
        name = LINEARS[module]
        weight = base["layers", name]
        out, size = weight.shape
        role_a, role_b = _ADAPTER_ROLES[weight.role]
        for part, shape, role in (
            ("A", (adapter.rank, size), role_a),
            ("B", (out, adapter.rank), role_b),
        ):
            table["layers", f"{name}_lora_{part.lower()}"] = Parameter(
                hf_name=weight.hf_name.replace(".weight", f".lora_{part}.weight"),
                shape=shape,
                role=role,
                stacked=True,
            )
    return table


def _layer_parameters(config: DecoderConfig) -> dict[str, Parameter]:
    d, f, h = config.hidden_size, config.ffn_size, config.head_dim
    q, kv = config.num_heads * h, config.num_kv_heads * h
    table: dict[str, Parameter] = {}

    def add(
        name: str, hf_name: str, shape: tuple[int, ...], role: Role, norm: bool = False
    ):
        hf_name = "model.layers.{}." + hf_name
        table[name] = Parameter(
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
    return table
