import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engine.errors import InputError
from engine.models import generate, init_model, load_model, parse_hf_config
from engine.models.architecture import Origin
from engine.models.generate import full_logits, greedy_generate
from engine.parallel.sharding import check_mesh, make_mesh, padded_vocab
from tests.engine.tiny_models import (
    mesh_of,
    one_device,
    random_tokens,
    relative,
    tiny_config,
    tiny_model,
    vocab_rows,
)

FIXTURES = Path(__file__).parents[2] / "fixtures" / "models"
FAMILIES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
# Fixtures are float32: their logits agree within this share of the largest one.
PARITY = 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_with_transformers(family):
    saved = np.load(FIXTURES / family / "logits.npz")
    model = load_model(FIXTURES / family, mesh=one_device(), dtype="float32")
    got = full_logits(model, jnp.asarray(saved["input_ids"]))
    assert relative(got, saved["logits"]) < PARITY


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ways_of_writing_a_config_mean_the_same(family):
    configs = [
        parse_hf_config(json.loads((FIXTURES / family / name).read_text()))
        for name in ("config.json", "config_v4.json")
    ]
    assert configs[0] == configs[1]


def test_no_token_sees_a_later_one():
    model = load_model(FIXTURES / "gemma3_text", mesh=one_device(), dtype="float32")
    tokens = random_tokens(2, 48, 160)
    changed = tokens.copy()
    changed[:, 30:] = (changed[:, 30:] + 1) % 160
    got = np.asarray(full_logits(model, jnp.asarray(tokens)))
    other = np.asarray(full_logits(model, jnp.asarray(changed)))
    np.testing.assert_array_equal(got[:, :30], other[:, :30])
    assert np.abs(got[:, 30:] - other[:, 30:]).min(axis=-1).max() > 0


def test_bfloat16_is_close_to_float32_and_not_the_same():
    tokens = jnp.asarray(random_tokens(2, 16))
    config = tiny_config("gemma2")
    logits = {
        dtype: full_logits(tiny_model(config, one_device(), dtype=dtype), tokens)
        for dtype in ("bfloat16", "float32")
    }
    # 3 layers of 8-bit mantissas; a wrong normaliser or norm is off by far more.
    assert 0 < relative(logits["bfloat16"], logits["float32"]) < 0.05


def test_greedy_generation_takes_the_likeliest_token_until_the_end(monkeypatch):
    model = tiny_model(tiny_config("qwen3"), mesh_of((2, 1, 2, 2)))
    alone = tiny_model(tiny_config("qwen3"), one_device())
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5], [1]]
    want = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(6):
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(text)] = text
            logits = full_logits(alone, jnp.asarray(padded))
            text.append(int(jnp.argmax(logits[0, len(text) - 1])))
        want.append(text[len(prompt) :])
    assert greedy_generate(model, prompts, 6, None) == want
    traced = []
    plain = generate._logits
    monkeypatch.setattr(generate, "_logits", lambda *a: traced.append(1) or plain(*a))
    eos = want[0][2]
    stopped = [one[: one.index(eos) + 1] if eos in one else one for one in want]
    assert greedy_generate(model, prompts, 6, eos) == stopped
    assert not traced  # compiled once
    with pytest.raises(InputError, match="no empty ones"):
        greedy_generate(model, [[1], []], 2, None)


def test_random_weights_are_the_same_on_every_mesh():
    config = tiny_config("gemma2", initializer_range=0.1)
    config = dataclasses.replace(config, origin=Origin(directory=FIXTURES, dtypes={}))
    models = [
        init_model(config, mesh=mesh, seed=3)
        for mesh in (one_device(), make_mesh(2, 2, 2))
    ]
    assert models[0].config.origin is None  # its numbers are from no checkpoint
    one, eight = (nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model in models)
    assert padded_vocab(config, make_mesh(2, 2, 2)) == 104
    one, eight = (vocab_rows(jax.tree.map(np.asarray, x), 101) for x in (one, eight))
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    assert one["embed"].std() == pytest.approx(0.1, rel=0.05)
    assert not one["layers"]["attn_norm"].any()  # gemma scales by 1 + weight
    assert np.abs(one["layers"]["k"] - one["layers"]["v"]).max() > 0.1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 3, "devices": 3}, "tensor=3 does not divide.*attention_heads=8"),
        ({"fsdp": 5, "devices": 5}, "fsdp=5 does not divide.*hidden_size=32"),
        ({"data": 3}, "data=3, fsdp=-1, tensor=1 does not fit 8 devices"),
        (
            {"fsdp": 2, "sequence": 3, "devices": 6},
            r"fsdp \* sequence=6 does not divide.*hidden_size=32",
        ),
        ({"data": -1}, "at most one of them -1"),
        ({"tensor": 0}, "must be positive"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    sizes = dict(sizes)
    devices = jax.devices()[: sizes.pop("devices", 8)]
    with pytest.raises(InputError, match=message):
        check_mesh(tiny_config("gemma2"), make_mesh(**sizes, devices=devices))


def test_tensor_must_suit_the_kv_heads():
    config = tiny_config("llama", num_attention_heads=12, num_key_value_heads=6)
    check_mesh(config, make_mesh(tensor=2))
    with pytest.raises(InputError, match="tensor=4 must divide.*num_key_value_heads=6"):
        check_mesh(config, make_mesh(tensor=4))


@pytest.mark.parametrize("option", [{"dtype": "int8"}, {"remat": "some"}])
def test_unknown_options_are_refused(option):
    with pytest.raises(InputError, match=rf"{next(iter(option))}=.*allowed"):
        tiny_model(tiny_config("llama"), one_device(), **option)
