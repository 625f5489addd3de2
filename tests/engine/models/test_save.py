"""What is written: the tensors, their dtype, the config, and what goes along."""

import json
import shutil
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import load_file

from engine.errors import InputError
from engine.models import save, save_pretrained
from engine.models.checkpoint import read_config
from engine.parallel.sharding import make_mesh
from tests.engine.checkpoints import (
    FAMILIES,
    FIXTURES,
    assert_same_params,
    checkpoint,
    contents,
    load,
    names_in,
    params,
)
from tests.engine.tiny_models import one_device, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_is_the_file_that_was_read(tmp_path, family):
    model = load(FIXTURES / family, make_mesh(2, 2, 2))
    save_pretrained(model, tmp_path)
    got = load_file(tmp_path / "model.safetensors")
    want = load_file(FIXTURES / family / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata()["format"] == "pt"  # transformers insists on it
    config = json.loads((FIXTURES / family / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text()) == config
    assert_same_params(load(tmp_path), load(FIXTURES / family))
    # The fixture's own note goes along; its logits.npz does not.
    assert names_in(tmp_path) == {"config.json", "config_v4.json", "model.safetensors"}


def to_dtypes(**dtypes):
    """A change of tensors: to the dtype `norm` those named so, to `rest` all others."""

    def change(tensors):
        for name, tensor in tensors.items():
            kind = dtypes["norm" if "norm" in name else "rest"]
            tensors[name] = tensor.astype(kind)

    return change


def dtypes_in(directory):
    return {
        name: tensor.dtype.name
        for path in directory.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_each_tensor_goes_out_in_the_dtype_that_it_came_in(tmp_path, param_dtype):
    kinds = {"norm": np.float32, "rest": jnp.bfloat16}
    path = checkpoint(tmp_path, change=to_dtypes(**kinds))
    model = load(path, param_dtype=param_dtype)
    out = tmp_path / "out"
    save_pretrained(model, out)
    assert dtypes_in(out) == dtypes_in(path)
    assert set(dtypes_in(out).values()) == {"float32", "bfloat16"}
    assert (out / "model.safetensors").stat().st_size < 1.01 * (
        path / "model.safetensors"
    ).stat().st_size + 2000
    # The config names what most of the bytes are.
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    save_pretrained(model, out, dtype="float32")
    assert set(dtypes_in(out).values()) == {"float32"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_a_model_from_no_checkpoint_goes_out_as_it_is_held(tmp_path):
    model = tiny_model(read_config(FIXTURES / "llama"), one_device())
    save_pretrained(model, tmp_path)
    assert set(dtypes_in(tmp_path).values()) == {"float32"}
    assert names_in(tmp_path) == {"config.json", "model.safetensors"}


def test_several_files_and_an_index(tmp_path):
    """float16 files into bfloat16 parameters, and out as float16 again."""
    halve = to_dtypes(norm=np.float16, rest=np.float16)
    path = checkpoint(tmp_path, change=halve)
    model = load(path, param_dtype="bfloat16")
    embed = params(model)["embed"]
    assert embed.dtype == jnp.bfloat16
    want = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(np.asarray(embed), want.astype(jnp.bfloat16))

    out = tmp_path / "out"
    save_pretrained(model, out)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    save_pretrained(model, out, max_file_bytes=20_000)
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {name: file for file in files for name in load_file(out / file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(
        load_file(out / file)[name].nbytes for name, file in held.items()
    )
    assert_same_params(load(out, param_dtype="bfloat16"), model)

    save_pretrained(model, out, dtype="float32")
    assert not list(out.glob("*0*.safetensors*")) + list(out.glob("*.index.json"))
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


def test_options_are_checked_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="save dtype='int8'"):
        save_pretrained(load(FIXTURES / "llama"), tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


ALONG = {
    "generation_config.json": '{"eos_token_id": [2, 3]}',
    "LICENSE": "as it was",
    "README.md": "of the base model",
    "preprocessor_config.json": "{}",
}
NOT_ALONG = (
    "modeling_llama.py",
    "optimizer.pt",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "trainer_state.json",
    "eval_results.json",
    "metrics.jsonl",
    "tokenizer.json",  # the tokenizer's business, which may be another one
    ".gitattributes",
)


def test_small_files_of_the_model_go_along(tmp_path):
    path = checkpoint(tmp_path)
    (path / "config_v4.json").unlink()
    for name, text in ALONG.items():
        (path / name).write_text(text)
    for name in NOT_ALONG:
        (path / name).write_text("{}")
    (path / "large.json").write_bytes(b" " * (2**22 + 1))
    (path / "onnx").mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("the user's own")
    save_pretrained(load(path), out)
    assert names_in(out) == {"config.json", "model.safetensors", *ALONG}
    want = ALONG | {"README.md": "the user's own"}
    assert {name: (out / name).read_text() for name in ALONG} == want
    # What a save has written, another one replaces, or takes away.
    (path / "LICENSE").unlink()
    (path / "generation_config.json").write_text("{}")
    save_pretrained(load(path), out)
    assert not (out / "LICENSE").exists()
    assert (out / "generation_config.json").read_text() == "{}"
    assert (out / "README.md").read_text() == "the user's own"


def test_a_directory_that_is_gone_is_told_of(tmp_path, caplog):
    path = checkpoint(tmp_path)
    model = load(path)
    shutil.rmtree(path)
    save_pretrained(model, tmp_path / "out")
    assert f"{path} is no longer there" in caplog.text
    assert names_in(tmp_path / "out") == {"config.json", "model.safetensors"}


def test_no_more_than_a_tensor_is_on_the_host(tmp_path):
    """For 24 layers in one file: not the file, nor one parameter of all layers."""
    values = read_config(FIXTURES / "llama").hf_config
    large = {"num_hidden_layers": 24, "hidden_size": 256, "intermediate_size": 512}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values | large))
    model = tiny_model(read_config(tmp_path), make_mesh(1, 2, 1, jax.devices()[:2]))
    save_pretrained(model, tmp_path / "warm")
    tracemalloc.start()
    save_pretrained(model, tmp_path / "out", dtype="bfloat16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = 256 * 512 * 4
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 20 * size
    # As held, as written, and what Python keeps of 200 names.
    assert peak < 1.5 * size + 400_000


def test_gathering_compiles_once_a_shape():
    """What each process does with an array that no process has all of."""
    mesh = make_mesh(2, 2, 2)
    model = load(FIXTURES / "llama", mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    pick: Any = save._pick  # jax types it as less than it is
    pick.clear_cache()
    shapes = set()
    for layer in (0, 1):
        for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)["layers"]):
            whole = pick(leaf, jnp.int32(layer), everywhere)
            assert whole.is_fully_replicated
            np.testing.assert_array_equal(whole, np.asarray(leaf)[layer])
            shapes.add((leaf.shape, leaf.sharding.spec))
    assert pick._cache_size() == len(shapes) < 9


def test_what_is_written_is_the_same_bytes_every_time(tmp_path):
    model = load(FIXTURES / "qwen2", make_mesh(2, 2, 2))
    for name in ("a", "b"):
        save_pretrained(model, tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
