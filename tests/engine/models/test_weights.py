import inspect
import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from engine.errors import InputError
from engine.models import Decoder, abstract_model, save_pretrained, tensors, weights
from engine.models.rope import inverse_frequencies
from engine.parallel.sharding import make_mesh, param_specs, place
from tests.engine.checkpoints import (
    FIXTURES,
    assert_same_params,
    checkpoint,
    load,
    params,
)

MESH = (2, 2, 2)


def test_each_device_holds_its_own_slices():
    mesh = make_mesh(*MESH)
    model = load(FIXTURES / "qwen2", mesh)
    whole = params(load(FIXTURES / "qwen2"))
    state = nnx.state(model, nnx.Param)
    specs = param_specs(model.config, mesh)
    shardings = jax.tree.map(lambda spec: place(spec, mesh), specs)
    assert jax.tree.structure(state) == jax.tree.structure(shardings)
    for leaf, sharding in zip(
        jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
    ):
        assert leaf.sharding == sharding
    up = params(model)["layers"]["up"]
    assert up.addressable_shards[0].data.shape == (2, 64 // 2, 48 // 2)
    for shard in up.addressable_shards:
        np.testing.assert_array_equal(
            np.asarray(shard.data), np.asarray(whole["layers"]["up"])[shard.index]
        )


def test_only_the_shard_is_read(monkeypatch):
    sizes = []
    read = weights.Reader.read

    def spy(self, name, index):
        found = read(self, name, index)
        sizes.append(found.size)
        return found

    monkeypatch.setattr(weights.Reader, "read", spy)
    load(FIXTURES / "llama", make_mesh(2, 2, 2))
    assert max(sizes) == 160 * 48 // 4  # the vocabulary, over fsdp and tensor


def test_a_vocabulary_that_the_mesh_does_not_divide_is_padded(tmp_path):
    def cut(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:149]

    path = checkpoint(tmp_path, change=cut, vocab_size=149)
    model = load(path, make_mesh(1, 2, 4))
    embed = np.asarray(params(model)["embed"])
    assert embed.shape == (152, 48) and not embed[149:].any() and embed[148].any()
    save_pretrained(model, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(
        saved["lm_head.weight"], load_file(path / "model.safetensors")["lm_head.weight"]
    )


def test_tensors_that_do_not_match_are_all_named(tmp_path):
    def spoil(tensors):
        del tensors["model.norm.weight"]
        for layer in (0, 1):
            del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
        tensors["model.layers.1.self_attn.q_norm.weight"] = np.ones(16, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :32].copy()

    with pytest.raises(InputError) as error:
        load(checkpoint(tmp_path, change=spoil))
    message = str(error.value)
    assert "\n" not in message
    missing = "missing: model.layers.{0,1}.mlp.up_proj.weight, model.norm.weight"
    assert missing in message
    assert "extra: model.layers.1.self_attn.q_norm.weight;" in message
    assert "mis-shaped: lm_head.weight is (160, 32), not (160, 48)" in message


def test_a_tied_head_that_is_the_embedding_is_left_out(tmp_path, caplog):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    path = checkpoint(tmp_path, "qwen3", change=add)
    model = load(path)
    assert model.config.tie_word_embeddings and not caplog.records
    assert_same_params(model, load(FIXTURES / "qwen3"))
    # An untied model must have its head.
    with pytest.raises(InputError, match="missing: lm_head.weight"):
        load(checkpoint(tmp_path / "b", "qwen3", tie_word_embeddings=False))


def test_a_head_that_is_not_the_embedding_is_kept(tmp_path, caplog, monkeypatch):
    """They differ in the last row alone, and are compared seven rows at a time."""
    monkeypatch.setattr(tensors, "_COMPARED_AT_ONCE", 48 * 7)

    def add(held):
        held["lm_head.weight"] = held["model.embed_tokens.weight"].copy()
        held["lm_head.weight"][-1] *= 2

    path = checkpoint(tmp_path, "qwen3", change=add)
    model = load(path)
    (record,) = caplog.records
    assert "lm_head.weight differs from" in record.getMessage()
    assert not model.config.tie_word_embeddings
    # As an untied model of the same tensors, which is what transformers 5 makes of it.
    untied = checkpoint(tmp_path / "b", "qwen3", change=add, tie_word_embeddings=False)
    assert_same_params(model, load(untied))
    assert model.config == load(untied).config
    assert not np.array_equal(params(model)["head"], params(model)["embed"])

    save_pretrained(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert_same_params(load(tmp_path / "out"), model)


def test_an_embedding_under_the_name_of_its_tied_head(tmp_path):
    """Torch's shared tensors are saved under one of their names."""

    def rename(held):
        held["lm_head.weight"] = held.pop("model.embed_tokens.weight")

    path = checkpoint(tmp_path, "qwen3", change=rename)
    assert_same_params(load(path), load(FIXTURES / "qwen3"))
    with pytest.raises(InputError, match="missing: model.embed_tokens.weight"):
        load(checkpoint(tmp_path / "b", "llama", change=rename))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("family", ["llama", "llama_rope_linear", "gemma3_text"])
def test_saved_rope_frequencies_are_compared(tmp_path, caplog, dtype, family):
    config = load(FIXTURES / family).config
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"

    def add(factor):
        def change(held):
            true = inverse_frequencies(config.ropes[1], config.head_dim)
            held[name] = (factor * true).astype(dtype)

        return change

    path = checkpoint(tmp_path / "same", family, change=add(1))
    assert_same_params(load(path), load(FIXTURES / family))
    assert not caplog.records
    path = checkpoint(tmp_path / "other", family, change=add(1.25))
    assert_same_params(load(path), load(FIXTURES / family))
    (record,) = caplog.records
    assert name in record.getMessage() and "config.json counts" in record.getMessage()


def test_a_buffer_of_another_name_is_extra(tmp_path):
    def add(held):
        held["model.layers.0.self_attn.rotary_emb.cos_cached"] = np.ones(8, np.float32)

    with pytest.raises(InputError, match="extra: .*cos_cached"):
        load(checkpoint(tmp_path, change=add))


def test_options_are_checked_before_anything_is_read():
    with pytest.raises(InputError, match="param_dtype='int8'; allowed: bfloat16"):
        load(FIXTURES / "llama", param_dtype="int8")
    with pytest.raises(InputError, match=r"mesh=5 must be a jax.sharding.Mesh"):
        # (Unwrapped: the type checker of the tests would speak first.)
        inspect.unwrap(weights.load_model)(FIXTURES / "llama", mesh=5)


def test_an_abstract_model_has_the_shape_of_a_real_one():
    mesh = make_mesh(*MESH)
    real = load(FIXTURES / "gemma3_text", mesh)
    abstract = abstract_model(real.config, mesh=mesh)
    assert isinstance(abstract, Decoder)
    pairs = zip(
        jax.tree.leaves(nnx.state(abstract, nnx.Param)),
        jax.tree.leaves(nnx.state(real, nnx.Param)),
        strict=True,
    )
    for a, b in pairs:
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
