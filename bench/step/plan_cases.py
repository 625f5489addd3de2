"""The cases of `bench.step.plan` and `plan_sequence`, and plain JAX's head in it."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
LLAMA_8B = _LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA_70B = _LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
GEMMA2_9B = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
QWEN3_8B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
# No model that there is: the vocabulary and the width of one whose layers are not
# Qwen3's, on Qwen3's layers.
WIDE_2B = QWEN3_8B | {
    "vocab_size": 248320,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model on a target; `ours` and `plain`: pairs on each device to compile.

    The border between what fits and what does not is meant to lie between them. Where
    rows are spread over devices (`sequence`), pairs are those of so many together.
    """

    name: str
    values: dict[str, Any]  # of config.json
    target: str
    ours: tuple[int, ...]
    plain: tuple[int, ...]
    lora: bool = False
    length: int = 2048  # of each sequence, of which half is scored
    sequence: int = 1


CASES = (
    Case(
        name="Llama-3.1-8B",
        values=LLAMA_8B,
        target="h200:8",
        ours=(50, 67, 68),
        plain=(16, 17),
    ),
    Case(
        name="Qwen3-8B, LoRA",
        values=QWEN3_8B,
        target="h200:1",
        lora=True,
        ours=(47, 61, 62),
        plain=(15, 16),
    ),
    Case(
        name="D=2048, V=248320",
        values=WIDE_2B,
        target="h200:1",
        ours=(83, 111, 112),
        plain=(8, 9),
    ),
    # To compile for a TPU takes several minutes of a core, but what does not fit is
    # refused soon, with what it would take.
    Case(name="Llama-3.1-8B", values=LLAMA_8B, target="v5e:4x4", ours=(4,), plain=(4,)),
    Case(
        name="Gemma-2-9B", values=GEMMA2_9B, target="v6e:4x4", ours=(16, 8), plain=(8,)
    ),
    Case(
        name="Llama-3.1-70B",
        values=LLAMA_70B,
        target="v5p:4x4x4",
        ours=(4, 12),
        plain=(16,),
    ),
)

# Long rows, spread over devices and each on one.
LONG_CASES = tuple(
    Case(
        name="Llama-3.1-8B",
        values=LLAMA_8B,
        target=target,
        ours=(1,),
        plain=(),
        length=length,
        sequence=sequence,
    )
    for target, length, sequence in (
        ("h200:8", 65536, 8),
        ("h200:8", 65536, 1),
        ("h200:8", 131072, 8),
        ("h200:8", 131072, 1),
        ("v5p:4x4x4", 65536, 16),
    )
)


def full_logits(
    hidden: Any,
    head: Any,
    targets: Any,
    *,
    axis_name: Any,
    rows_axis: Any,
    num_valid: Any = None,
    bias: Any = None,
    softcap: float | None = None,
    stats: tuple[str, ...] = (),
    **_: Any,
) -> Any:
    """What a JAX user writes in the place of `spread_token_logprobs`.

    float32 logits of all rows, over the devices' shards of the vocabulary, and their
    log-softmax at the targets. It is spared the stats, which are zeros.
    """
    import jax.numpy as jnp
    from jax import lax

    from dpo_kernels import TokenLogprobs

    T = hidden.shape[0]
    hidden = lax.all_gather(hidden, rows_axis, tiled=True)
    targets = lax.all_gather(targets, rows_axis, tiled=True, to="invarying")
    z_TV = jnp.einsum("TD,VD->TV", hidden, head, preferred_element_type=jnp.float32)
    if softcap is not None:
        z_TV = softcap * jnp.tanh(z_TV / softcap)
    if bias is not None:
        z_TV += bias[None, :]
    top = lax.pmax(lax.stop_gradient(z_TV.max(axis=1)), axis_name)
    total = lax.psum(jnp.exp(z_TV - top[:, None]).sum(axis=1), axis_name)
    local = targets - lax.axis_index(axis_name) * head.shape[0]
    own = (local >= 0) & (local < head.shape[0])
    picked = jnp.take_along_axis(z_TV, jnp.where(own, local, 0)[:, None], axis=1)[:, 0]
    lse = top + jnp.log(total)
    logprob = lax.psum(jnp.where(own, picked, 0.0), axis_name) - lse
    first = lax.axis_index(rows_axis) * T
    logprob, lse = (lax.dynamic_slice_in_dim(x, first, T) for x in (logprob, lse))
    valid = jnp.arange(T, dtype=jnp.int32) < num_valid
    zeros = jnp.zeros_like(lse)
    spared = {name: zeros for name in stats if name != "top1"}
    if "top1" in stats:
        spared["top1"] = zeros > 0
    return TokenLogprobs(logprob=jnp.where(valid, logprob, 0.0), lse=lse, **spared)


@contextlib.contextmanager
def plain_head() -> Iterator[None]:
    """Within it the engine's step has plain JAX's head."""
    from engine.objective import scoring

    ours = scoring.spread_token_logprobs
    scoring.spread_token_logprobs = full_logits
    try:
        yield
    finally:
        scoring.spread_token_logprobs = ours


def write_config(values: dict[str, Any], folder: Path) -> str:
    """A checkpoint's directory without weights, of what its config.json says."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def run_of(
    model: str,
    pairs: int,
    length: int,
    *,
    options: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **sections: Any,
) -> Any:
    """A run of pairs of `length` tokens, of which half are scored; without data.

    Args:
        model: a directory that has a config.json.
        pairs: of a step, over all devices.
        options: more of the model's; trainer: more of the trainer's.
        sections: others of the run's.
    """
    # Here, as the process that asks for a plan must not have started JAX.
    from engine.config.dpo import DPOConfig
    from engine.config.run import MixtureConfig, ModelConfig, RunConfig, SourceConfig

    return RunConfig(
        model=ModelConfig(name_or_path=model, **options or {}),
        mixture=MixtureConfig(informs=(SourceConfig(data_files="none.jsonl"),)),
        trainer=DPOConfig(
            total_batch_size=pairs,
            max_length=length,
            max_prompt_length=length // 2,
            max_completion_length=length // 2,
            **trainer or {},
        ),
        **sections,
    )
