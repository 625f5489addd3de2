import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from engine.errors import InputError
from engine.models import Decoder, abstract_model, load_model, save_pretrained, weights
from engine.models.weights import read_config
from engine.parallel.sharding import make_mesh, param_shardings

FIXTURES = Path(__file__).parents[2] / "fixtures" / "models"
FAMILIES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
MESH = (2, 2, 2)


def one_device():
    return make_mesh(1, 1, 1, jax.devices()[:1])


def load(directory, mesh=None, **options):
    return load_model(directory, mesh=mesh or one_device(), **options)


def checkpoint(tmp_path, family="llama", change=None, **config):
    """A copy of a fixture, with other config keys and tensors."""
    target = tmp_path / "checkpoint"
    shutil.copytree(FIXTURES / family, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if change is not None:
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def params(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def assert_same_params(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
        params(got),
        params(want),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_the_file_that_was_read(tmp_path, family):
    model = load(FIXTURES / family, make_mesh(*MESH))
    save_pretrained(model, tmp_path)
    got = load_file(tmp_path / "model.safetensors")
    want = load_file(FIXTURES / family / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers insists on it
    config = json.loads((FIXTURES / family / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert_same_params(load(tmp_path), load(FIXTURES / family))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors"}


def test_each_device_holds_its_own_slices():
    mesh = make_mesh(*MESH)
    model = load(FIXTURES / "qwen2", mesh)
    whole = params(load(FIXTURES / "qwen2"))
    state = nnx.state(model, nnx.Param)
    shardings = param_shardings(model.config, mesh)
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


def test_kinds_of_files(tmp_path):
    """float16 files, bfloat16 parameters, several files and an index, other dtypes."""

    def halve(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(np.float16)

    path = checkpoint(tmp_path, change=halve)
    model = load(path, param_dtype="bfloat16")
    embed = params(model)["embed"]
    assert embed.dtype == jnp.bfloat16
    want = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(np.asarray(embed), want.astype(jnp.bfloat16))

    out = tmp_path / "out"
    save_pretrained(model, out)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    save_pretrained(model, out, max_file_bytes=20_000)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {
        name: file.name
        for file in out.glob("*.safetensors")
        for name in load_file(file)
    }
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(
        load_file(out / file)[name].nbytes for name, file in held.items()
    )
    assert_same_params(load(out, param_dtype="bfloat16"), model)

    save_pretrained(model, out, dtype="float32")
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors"}
    assert load_file(out / "model.safetensors")["lm_head.weight"].dtype == np.float32
    assert_same_params(load(out, param_dtype="bfloat16"), model)


@pytest.mark.parametrize(
    ("config", "key"),
    [("config_v4.json", "torch_dtype"), ("config.json", "dtype")],
)
def test_the_config_tells_the_dtype_in_its_own_words(tmp_path, config, key):
    path = checkpoint(tmp_path)
    shutil.copy(FIXTURES / "llama" / config, path / "config.json")
    save_pretrained(load(path), tmp_path / "out", dtype="bfloat16")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved[key] == "bfloat16"
    assert saved | {key: "float32"} == json.loads((path / "config.json").read_text())


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


def test_harmless_extras_are_no_error(tmp_path):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    path = checkpoint(tmp_path, "qwen3", change=add)
    assert_same_params(load(path), load(FIXTURES / "qwen3"))
    # An untied model must have its head.
    with pytest.raises(InputError, match="missing: lm_head.weight"):
        load(checkpoint(tmp_path / "b", "qwen3", tie_word_embeddings=False))


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def quantise(path):
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    save_file(tensors, path / "model.safetensors")


def lose_a_file(path):
    (path / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "model.safetensors: not a whole safetensors file"),
        (quantise, "'lm_head.weight' is I8; allowed: BF16, F16, F32"),
        (lambda path: (path / "config.json").unlink(), "config.json: missing"),
        (lambda path: (path / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda path: (path / "config.json").write_text("[]"), "must be a JSON object"),
        (lambda path: (path / "model.safetensors").unlink(), "no weights; expected"),
        (lose_a_file, "model-00001-of-00001.safetensors: not a whole"),
    ],
)
def test_a_broken_directory_is_refused(tmp_path, spoil, message):
    path = checkpoint(tmp_path)
    spoil(path)
    with pytest.raises(InputError, match=message) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere/at/all", "no such directory, and it is no hub id"),
        ("nobody/no-such-model", "no such directory, and downloading it"),
        ("..", "config.json: missing"),
        (str(FIXTURES / "llama" / "config.json"), "is a file"),
    ],
)
def test_a_model_that_is_not_there(name, message):
    with pytest.raises(InputError, match=message) as error:
        load(name)
    assert "\n" not in str(error.value)


def test_options_are_checked_before_anything_is_read(tmp_path):
    with pytest.raises(InputError, match="param_dtype='int8'; allowed: bfloat16"):
        load(FIXTURES / "llama", param_dtype="int8")
    with pytest.raises(InputError, match="save dtype='int8'"):
        save_pretrained(load(FIXTURES / "llama"), tmp_path / "out", dtype="int8")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made a directory"):
        save_pretrained(load(FIXTURES / "llama"), tmp_path / "file")


def test_an_interrupted_save_leaves_the_old_weights(tmp_path, monkeypatch):
    save_pretrained(load(FIXTURES / "llama"), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = load(FIXTURES / "llama_rope_linear")

    def fail(array, model):
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.models.save._to_host", fail)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(model, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert load(tmp_path).config == read_config(FIXTURES / "llama")


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
