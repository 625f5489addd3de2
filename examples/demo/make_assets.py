"""Makes everything the demo needs: tokenizer, pretrained checkpoint, preference pairs.

Run it from anywhere: `python examples/demo/make_assets.py`. It takes five to ten
minutes on two CPU cores. What it writes beside itself, `model/`, `train.jsonl` and
`heldout.jsonl`, is kept in the repository. It is seeded throughout.
"""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from corpus import preference_pairs, pretraining_conversations
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.models import Decoder, init_model, parse_hf_config, save_pretrained
from engine.models.generate import full_logits

HERE = Path(__file__).parent
PAD, BEGIN, END, USER, ASSISTANT = SPECIALS = (
    "<|pad|>",
    "<|begin|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message.role + '|>' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
VOCAB_SIZE = 1024
LENGTH = 64  # tokens; every conversation fits
STEPS, ROWS, PEAK_RATE = 1000, 64, 3e-3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the corpus, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sample = itertools.islice(pretraining_conversations(seed=0), 20_000)
    texts = (message["content"] for messages in sample for message in messages)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
    )


def hf_config(tokenizer: PreTrainedTokenizerFast) -> dict:
    """A small Llama: 4 layers, grouped-query attention, a head of its own."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "bfloat16",
    }


def token_batches(tokenizer: Any) -> Iterator[np.ndarray]:
    """Endless [ROWS, LENGTH] batches of conversations, padded on the right."""
    conversations = pretraining_conversations(seed=1)
    while True:
        messages = list(itertools.islice(conversations, ROWS))
        yield tokenizer.apply_chat_template(
            messages,
            padding="max_length",
            max_length=LENGTH,
            return_tensors="np",
            return_dict=True,
        )["input_ids"]


def pretrain(model: Decoder, batches: Iterator[np.ndarray], pad_id: int) -> None:
    """Next-token training of `model`, in place; prints the loss."""
    graphdef, params = nnx.split(model, nnx.Param)
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, STEPS // 10, STEPS)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01)
    )

    def loss(params, tokens_RS):
        logits_RSV = full_logits(nnx.merge(graphdef, params), tokens_RS)[:, :-1]
        targets_RS = tokens_RS[:, 1:]
        crossed = optax.softmax_cross_entropy_with_integer_labels
        losses_RS = crossed(logits_RSV, targets_RS)
        real_RS = targets_RS != pad_id
        return jnp.sum(losses_RS * real_RS) / jnp.sum(real_RS)

    @jax.jit
    def step(params, opt_state, tokens_RS):
        value, grads = jax.value_and_grad(loss)(params, tokens_RS)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state = optimizer.init(params)
    for number, tokens_RS in enumerate(itertools.islice(batches, STEPS), start=1):
        params, opt_state, value = step(params, opt_state, jnp.asarray(tokens_RS))
        if number % 50 == 0:
            print(f"pretraining step {number:4d}/{STEPS}  loss {value:.4f}", flush=True)
    nnx.update(model, params)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Writes the pairs, then the checkpoint with its tokenizer."""
    train, held_out = preference_pairs(seed=0)
    write_jsonl(HERE / "train.jsonl", train)
    write_jsonl(HERE / "heldout.jsonl", held_out)
    tokenizer: Any = make_tokenizer()  # its methods' annotations are too wide to use
    config = parse_hf_config(hf_config(tokenizer))
    model = init_model(config, dtype="float32", remat="none")
    pretrain(model, token_batches(tokenizer), tokenizer.pad_token_id)
    shutil.rmtree(HERE / "model")
    save_pretrained(model, HERE / "model", tokenizer=tokenizer, dtype="bfloat16")


if __name__ == "__main__":
    main()
