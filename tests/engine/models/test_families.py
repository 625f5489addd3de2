import math

import pytest

from engine.errors import InputError
from engine.models.architecture import max_positions
from engine.models.families import FAMILIES, parse_hf_config
from tests.engine.hf_configs import FULL, LINEAR, LLAMA3, SLIDING, parse, values


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_family_leaves_unsaid_is_what_transformers_takes(model_type):
    config = parse(model_type)
    gemma = model_type.startswith("gemma")
    assert config.tie_word_embeddings == gemma
    assert config.activation == ("gelu_tanh" if gemma else "silu")
    assert config.qkv_bias == (model_type == "qwen2")
    assert config.qk_norm == (model_type in ("qwen3", "gemma3_text"))
    assert config.embed_scale == pytest.approx(math.sqrt(32) if gemma else 1)
    assert config.query_scale == pytest.approx(256**-0.5 if gemma else 8**-0.5)
    assert config.attn_softcap == (50.0 if model_type == "gemma2" else None)
    assert config.final_softcap == (30.0 if model_type == "gemma2" else None)
    theta = {1e6, 1e4} if model_type == "gemma3_text" else {1e4}
    assert {
        rope.theta for rope in parse(model_type, num_hidden_layers=6).ropes
    } == theta


def test_the_config_is_kept_as_read():
    given = values("llama", my_note={"by": "hand"})
    assert parse_hf_config(given).hf_config == given
    # Notes do not make another architecture: compiled code is shared.
    assert parse_hf_config(given) == parse("llama")
    assert hash(parse_hf_config(given)) == hash(parse("llama"))


@pytest.mark.parametrize(
    ("model_type", "head_dim", "size"),
    [
        ("llama", None, 8),
        ("mistral", "absent", 8),
        ("qwen2", "absent", 8),
        ("qwen3", "absent", 128),
        ("gemma2", "absent", 256),
        ("llama", 20, 20),
    ],
)
def test_head_dim(model_type, head_dim, size):
    assert parse(model_type, head_dim=head_dim).head_dim == size


@pytest.mark.parametrize(
    ("model_type", "heads", "given", "kv_heads"),
    [
        ("llama", 4, "absent", 4),
        ("llama", 4, None, 4),
        ("mistral", 16, "absent", 8),
        ("qwen2", 32, "absent", 32),
        ("gemma2", 8, "absent", 4),
    ],
)
def test_kv_heads(model_type, heads, given, kv_heads):
    config = parse(model_type, num_attention_heads=heads, num_key_value_heads=given)
    assert config.num_kv_heads == kv_heads


@pytest.mark.parametrize(
    ("model_type", "changes", "layers", "window"),
    [
        ("llama", {}, [FULL] * 4, None),
        ("mistral", {}, [SLIDING] * 4, 4096),
        ("mistral", {"sliding_window": 9}, [SLIDING] * 4, 9),
        ("mistral", {"sliding_window": None}, [FULL] * 4, None),
        ("qwen2", {"sliding_window": 9}, [FULL] * 4, None),
        (
            "qwen3",
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3},
            [FULL, FULL, FULL, SLIDING],
            9,
        ),
        ("qwen2", {"use_sliding_window": True}, [FULL] * 4, None),
        ("gemma2", {"sliding_window": 9}, [SLIDING, FULL] * 2, 9),
        ("gemma3_text", {}, [SLIDING] * 4, 4096),
        (
            "gemma3_text",
            {"sliding_window_pattern": 3},
            [SLIDING, SLIDING, FULL, SLIDING],
            4096,
        ),
        (
            "gemma3_text",
            {"sliding_window_pattern": 3, "layer_types": [FULL, SLIDING, FULL, FULL]},
            [FULL, SLIDING, FULL, FULL],
            4096,
        ),
        ("gemma2", {"layer_types": [FULL] * 4}, [FULL] * 4, None),
    ],
)
def test_layer_types(model_type, changes, layers, window):
    config = parse(model_type, **changes)
    assert list(config.layer_types) == layers
    assert config.sliding_window == window


@pytest.mark.parametrize(
    ("model_type", "positions"),
    [("llama", 2048), ("mistral", 131072), ("qwen3", 32768), ("gemma2", 8192)],
)
def test_how_long_a_sequence_may_be(model_type, positions):
    assert max_positions(parse(model_type)) == 512
    config = parse(model_type, max_position_embeddings="absent")
    assert max_positions(config) == positions


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        (
            "mixtral",
            {},
            "model_type 'mixtral' is not supported; allowed: llama, mistral",
        ),
        ("gemma3", {}, "model_type 'gemma3'"),
        (None, {}, "model_type None"),
        (
            "llama",
            {"architectures": ["LlamaForSequenceClassification"]},
            "LlamaForCausal",
        ),
        ("llama", {"hidden_act": "relu2"}, "hidden_act 'relu2'"),
        (
            "gemma2",
            {"hidden_activation": "quick_gelu"},
            "hidden_activation 'quick_gelu'",
        ),
        ("qwen3", {"num_experts": 8}, "num_experts=8"),
        (
            "phi5",
            {"auto_map": {"AutoConfig": "a.B"}},
            "model_type 'phi5'.*code that comes with it, which is never run",
        ),
        (
            "llama",
            {
                "auto_map": {"AutoModelForCausalLM": "a.B"},
                "architectures": ["B"],
            },
            "architectures.*code that comes with it, which is never run",
        ),
        ("llama", {"rms_norm_eps": math.inf}, "rms_norm_eps=inf"),
        ("llama", {"rope_theta": math.nan}, "rope_theta=nan"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config="),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50"),
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"sliding_window": 8}, "sliding_window=8"),
        ("mistral", {"layer_types": [FULL] * 4}, "layer_types="),
        ("gemma2", {"layer_types": [FULL, SLIDING]}, "layer_types has 2 entries"),
        ("gemma2", {"layer_types": 3}, "layer_types=3 must be a list"),
        ("qwen2", {"max_window_layers": "all"}, "max_window_layers='all'"),
        ("gemma2", {"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ("qwen3", {"layer_types": [SLIDING] * 4}, "no sliding_window is set"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ("llama", {"head_dim": 7}, "head_dim=7 must be even"),
        ("llama", {"head_dim": None, "hidden_size": 30}, "set head_dim"),
        ("llama", {"vocab_size": "absent"}, "vocab_size is missing"),
        ("llama", {"hidden_size": "32"}, "hidden_size='32' must be an integer"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
        ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0"),
        ("llama", {"rms_norm_eps": 10**400}, "json: rms_norm_eps=1000+.* must be a f"),
        ("llama", {"rope_theta": 10**400}, "rope rope_theta=1000+.* must be a finite"),
        ("gemma2", {"final_logit_softcapping": 10**400}, "final_logit_softcapping=10"),
        ("llama", {"hidden_size": 10**400}, "json: hidden_size=1000+.* is too large"),
        ("gemma2", {"vocab_size": 2**31}, "vocab_size=2147483648 is too large; at mo"),
        ("llama", {"num_hidden_layers": 10**7}, "num_hidden_layers=10000000 is too"),
        ("llama", {"architectures": 5}, "architectures=5 must be a list of names"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "='Lla.* must be a list"),
        ("llama", {"hidden_act": ["silu"]}, "hidden_act \\['silu'\\] is not supp"),
        ("llama", {"hidden_act": {"a": 1}}, "hidden_act {'a': 1} is not supported"),
        ("gemma2", {"hidden_activation": ["a"]}, "hidden_activation \\['a'\\] is n"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2}},
            "rope_type 'yarn'",
        ),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope factor=None"),
        ("llama", {"rope_scaling": [1]}, "rope_scaling=.* must be an object"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
            "low_freq_factor < high_freq_factor",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "attention_factor": 2.0}},
            "rope option 'attention_factor'",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        (
            "llama",
            {
                "rope_parameters": {"rope_type": "default"},
                "rope_scaling": {"rope_type": "linear", "factor": 2},
            },
            "contradict",
        ),
        (
            "llama",
            {"rope_parameters": {FULL: {"rope_type": "default"}}},
            "gemma3_text only",
        ),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "keyed by"),
        ("gemma3_text", {"rope_scaling": {FULL: LINEAR}}, "a plain rope_scaling"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(model_type, changes, message):
    with pytest.raises(InputError, match=message) as error:
        parse(model_type, **changes)
    assert "\n" not in str(error.value)


def test_code_beside_a_known_architecture_is_passed_over(caplog):
    """As transformers does that is told to trust no code."""
    assert parse("llama", auto_map={"AutoModel": "own.Own"}) == parse("llama")
    assert "never run; it is read as the LlamaForCausalLM" in caplog.text


def test_null_and_neutral_options_are_no_options():
    plain = parse("llama")
    neutral = parse(
        "llama",
        attention_dropout=0.1,  # a preference run trains without it, as in TRL
        pretraining_tp=2,  # no longer read by transformers
        quantization_config=None,
        rope_scaling=None,
        num_experts=None,
        partial_rotary_factor=1.0,
        sliding_window=None,
        architectures=None,
        use_cache=True,
    )
    assert neutral == plain
