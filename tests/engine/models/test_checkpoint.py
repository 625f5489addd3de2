"""Directories that are no checkpoint, or a damaged one, are refused in one line."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.errors import InputError, library_errors, one_line
from engine.models import check_checkpoint, save_pretrained
from tests.engine.checkpoints import FIXTURES, checkpoint, load

INDEX = "model.safetensors.index.json"


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def quantise(path):
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    save_file(tensors, path / "model.safetensors")


def dangle(name):
    def change(path):
        (path / name).unlink()
        (path / name).symlink_to("../blobs/gone")

    return change


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
        (lose_a_file, "1 of its 1 files are missing: model-00001-of-00001"),
        (dangle("model.safetensors"), "model.safetensors: a link to ../blobs/gone, wh"),
        (dangle("config.json"), "config.json: a link to ../blobs/gone, which is not"),
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
        ("~no-such-user/model", "no such directory, and it is no hub id"),
        ("x" * 300, "File name too long"),
        (str(FIXTURES / "llama" / "config.json"), "is a file"),
    ],
)
def test_a_model_that_is_not_there(name, message):
    with pytest.raises(InputError, match=message) as error:
        load(name)
    assert "\n" not in str(error.value)


def move_weights(name):
    return lambda path: (path / "model.safetensors").rename(path / name)


def shard(path):
    """The same tensors in several files."""
    model = load(path)
    (path / "model.safetensors").unlink()
    save_pretrained(model, path / "out", max_file_bytes=20_000)
    shutil.copytree(path / "out", path, dirs_exist_ok=True)
    shutil.rmtree(path / "out")
    return sorted(file.name for file in path.glob("model-*.safetensors"))


def lose_shards(path):
    for name in shard(path)[1:3]:
        (path / name).unlink()


def hold_a_tensor_twice(path):
    first, second = shard(path)[:2]
    tensors = load_file(path / second) | dict([load_file(path / first).popitem()])
    save_file(tensors, path / second)


def point_outside(path):
    (path / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (path / INDEX).write_text(json.dumps(index))


def make_adapter(path):
    (path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (make_adapter, "a LoRA .PEFT. adapter of 'org/base', not a whole model; give "),
        (
            lambda path: (path / "modules.json").write_text("[]"),
            "a sentence-transformers model",
        ),
        (move_weights("model-Q4_K_M.gguf"), "model-Q4_K_M.gguf is GGUF"),
        (move_weights("pytorch_model.bin"), "pytorch_model.bin is pickled weights"),
        (move_weights("consolidated.00.pth"), "is the original format of Llama"),
        (move_weights("tf_model.h5"), "is weights of another framework"),
        (move_weights("model.fp16.safetensors"), "is weights under another name"),
        (lambda path: [(path / INDEX).unlink() for _ in [shard(path)]], "their index"),
        (lose_shards, "2 of its [0-9]+ files are missing: model-00002-of-.*fetch"),
        (hold_a_tensor_twice, "model-00002-of-.* holds '.*', which the index says"),
        (point_outside, "names ../model.safetensors; only files beside it"),
        (
            lambda path: (path / "model.safetensors").write_bytes(b""),
            "model.safetensors: empty; fetch it again",
        ),
        (
            lambda path: (path / "model.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
            ),
            "a Git LFS pointer, not the weights; fetch them: git lfs pull",
        ),
        (
            lambda path: (path / "config.json").write_bytes(b'{"a": "\xff"}'),
            "config.json: not JSON",
        ),
        (lambda path: (path / "config.json").write_text("[" * 10**5), "not JSON"),
    ],
)
def test_what_else_a_directory_may_be(tmp_path, spoil, message):
    path = checkpoint(tmp_path)
    spoil(path)
    for read in (load, check_checkpoint):  # what trains refuses, and what validates
        with pytest.raises(InputError, match=message) as error:
            read(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_is_checked_without_reading_it(monkeypatch):
    want = load(FIXTURES / "qwen3").config
    monkeypatch.setattr("engine.models.reader.Reader.read", None)
    assert check_checkpoint(FIXTURES / "qwen3") == want


def test_what_a_library_raises_becomes_one_line():
    with pytest.raises(InputError, match=r"^it said: two lines$") as error:
        with library_errors(lambda error: f"it said: {one_line(error)}"):
            raise Exception("two\n  lines")
    assert str(error.value.__cause__) == "two\n  lines"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 10**4))) < 310
    for passed in (InputError("ours"), MemoryError(), KeyboardInterrupt()):
        with pytest.raises(type(passed)) as same:
            with library_errors(one_line):
                raise passed
        assert same.value is passed


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = checkpoint(tmp_path)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path / "config.json"))

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(InputError, match="config.json: .*Permission denied"):
        check_checkpoint(path)
