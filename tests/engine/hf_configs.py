"""Small `config.json`s, as dicts and parsed."""

from engine.models.families import parse_hf_config

FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def values(model_type, **changes):
    base = {
        "model_type": model_type,
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
    }
    merged = base | changes
    return {key: value for key, value in merged.items() if value != "absent"}


def parse(model_type, **changes):
    return parse_hf_config(values(model_type, **changes))
