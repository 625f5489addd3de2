"""A save replaces what an earlier one wrote, whole, and touches nothing else."""

import errno
import os
import resource
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from engine.errors import InputError
from engine.models import check_save_directory, save, save_pretrained
from engine.models.checkpoint import read_config
from tests.engine.checkpoints import (
    FIXTURES,
    assert_same_params,
    contents,
    load,
    names_in,
)

USERS = (
    "model_backup.safetensors",
    "model-ema.safetensors",
    "model.safetensors.bak",
    "model-00001-of-00002.safetensors.old",
    "ema/model.safetensors",
    ".model-notes.part",
    "metrics.jsonl",
)


@pytest.fixture(scope="module")
def llama():
    return load(FIXTURES / "llama")


@pytest.fixture(scope="module")
def other():
    return load(FIXTURES / "llama_rope_linear")


def put_users_files(directory):
    for name in USERS:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"the user's")


def test_only_an_earlier_save_is_removed(tmp_path, llama):
    put_users_files(tmp_path)
    for limit in (20_000, 30_000, 10**9, 20_000):
        save_pretrained(llama, tmp_path, max_file_bytes=limit)
        ours = names_in(tmp_path) - set(USERS)
        weights = {name for name in ours if name.endswith(".safetensors")}
        index = {"model.safetensors.index.json"} if len(weights) > 1 else set()
        assert ours == weights | index | {"config.json", "config_v4.json"}
        assert all((tmp_path / name).read_bytes() == b"the user's" for name in USERS)
        assert_same_params(load(tmp_path), llama)
    assert len(weights) > 1


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
    ],
)
def test_what_no_save_has_written_is_not_replaced(tmp_path, llama, name):
    if name.endswith("0002.safetensors"):
        save_file(load_file(FIXTURES / "llama" / "model.safetensors"), tmp_path / name)
    else:
        (tmp_path / name).write_text("somebody's")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=f"has {name}, which this program did not"):
        save_pretrained(llama, tmp_path)
    with pytest.raises(InputError, match="give another save_directory"):
        check_save_directory(tmp_path, {})
    assert contents(tmp_path) == before


def test_a_model_put_over_an_earlier_save_is_not_replaced(tmp_path, llama):
    save_pretrained(llama, tmp_path)
    shutil.copy(FIXTURES / "qwen3" / "model.safetensors", tmp_path)
    with pytest.raises(InputError, match="has model.safetensors, config.json, which"):
        check_save_directory(tmp_path, {})


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path, llama, monkeypatch):
    """The new model is not lost either."""
    write = save._write_all

    def write_and_meet(staging, directory, *rest):
        write(staging, directory, *rest)
        (directory / "config.json").write_text("somebody's")

    monkeypatch.setattr(save, "_write_all", write_and_meet)
    with pytest.raises(InputError, match=r"has config.json, which .*whole in"):
        save_pretrained(llama, tmp_path)
    assert (tmp_path / "config.json").read_text() == "somebody's"
    assert_same_params(load(tmp_path / ".model.part"), llama)


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["_to_host", "_write_json", "_copy_companions"])
def test_a_full_disk_leaves_the_old_model_whole(
    tmp_path, llama, other, monkeypatch, place
):
    save_pretrained(llama, tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(save, place, full_disk)
    with pytest.raises(InputError, match="No space left on device.*as it was") as error:
        save_pretrained(other, tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert contents(tmp_path) == before and names_in(tmp_path) == set(before)


def test_a_write_that_fails_midway(tmp_path, llama, other):
    """The operating system's own error, in the midst of a file."""
    save_pretrained(llama, tmp_path)
    before = contents(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(InputError, match="could not be saved .*File too large"):
            save_pretrained(other, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path) == before
    save_pretrained(other, tmp_path)
    assert_same_params(load(tmp_path), other)


def test_an_interrupted_save_leaves_the_old_weights(
    tmp_path, llama, other, monkeypatch
):
    save_pretrained(llama, tmp_path)
    before = contents(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(save, "_to_host", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save_pretrained(other, tmp_path)
    assert contents(tmp_path) == before
    assert load(tmp_path).config == read_config(FIXTURES / "llama")


def test_what_a_killed_save_has_left_is_removed(tmp_path, llama):
    put_users_files(tmp_path)
    (tmp_path / ".model.part").mkdir()
    leftovers = (
        ".model.part/.dpo-engine",
        ".model.part/model.safetensors",
        ".model.safetensors.part",
        ".model-00001-of-00002.safetensors.part",
        ".model.safetensors.index.json.part",
        ".config.json.part",
    )
    for name in leftovers:
        (tmp_path / name).write_bytes(b"half")
    check_save_directory(tmp_path, {})
    save_pretrained(llama, tmp_path)
    ours = {"config.json", "config_v4.json", "model.safetensors"}
    assert names_in(tmp_path) == {*USERS, *ours}


@pytest.mark.parametrize("kind", ["directory", "link", "file"])
def test_a_users_own_part_is_not_removed(tmp_path, llama, kind):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".dpo-engine").write_text("mine")
    part = tmp_path / "out" / ".model.part"
    part.parent.mkdir()
    if kind == "directory":
        part.mkdir()
        (part / "notes.txt").write_text("mine")
    elif kind == "link":
        part.symlink_to(tmp_path / "elsewhere")
    else:
        part.write_text("mine")
    before = contents(tmp_path)
    for save_there in (
        lambda: check_save_directory(part.parent, {}),
        lambda: save_pretrained(llama, part.parent),
    ):
        with pytest.raises(InputError, match=r"has \.model\.part, which this program"):
            save_there()
    assert contents(tmp_path) == before


def test_names_in_a_header_stay_in_the_directory(tmp_path, llama):
    """A file that only claims to be an earlier save cannot have others removed."""
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "mine").write_text("")
    names = '["../mine", "..", "/etc/hosts", "a/../../mine", "note.txt"]'
    (out / "note.txt").write_text("")
    metadata = {"format": "pt", "writer": "dpo-engine", "files": names}
    tensors = load_file(FIXTURES / "llama" / "model.safetensors")
    save_file(tensors, out / "model.safetensors", metadata)
    save_pretrained(llama, out)
    assert (tmp_path / "mine").exists() and not (out / "note.txt").exists()


@pytest.mark.parametrize(
    "spelling",
    ["{base}", "{base}/", "{base}/../base", "link", "~/base", "base", "no/../base"],
)
@pytest.mark.parametrize("option", ["model.name_or_path", "model.tokenizer"])
def test_the_directory_of_a_source_is_refused(tmp_path, monkeypatch, spelling, option):
    base = tmp_path / "base"
    shutil.copytree(FIXTURES / "llama", base)
    (tmp_path / "link").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = contents(tmp_path)
    for target, source in (
        (spelling.format(base=base), base),
        (base, spelling.format(base=base)),
    ):
        sources = {"reference_model.name_or_path": None, option: source}
        with pytest.raises(InputError, match=f"is the directory of {option}="):
            check_save_directory(target, sources)
    inside = check_save_directory(base / "out", {option: base})
    assert inside == base / "out"
    check_save_directory(tmp_path / "new", {option: "org/name"})
    assert contents(tmp_path) == before and not (base / "out").exists()


@pytest.mark.parametrize("target", ["data", ".", "data/deep/..", "no/../data"])
@pytest.mark.parametrize("path", ["data/a.jsonl", "data", "data/*.jsonl", "linked"])
def test_the_folder_of_the_data_is_refused(tmp_path, monkeypatch, target, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "a.jsonl").write_text("{}")
    (tmp_path / "linked").symlink_to(tmp_path / "data" / "a.jsonl")
    data = {"mixture.informs.0.data_files": ("hf://a/b", "org/name", path)}
    with pytest.raises(InputError, match="is, or holds, the folder of mixture.informs"):
        check_save_directory(target, {}, data)
    for name in ("out", "data/deep", "data/out"):
        check_save_directory(name, {}, data)


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, message in (
        ("file", "file' is a file"),
        ("file/below/that", "cannot be made, as '.*file' is a file"),
        ("dangling", "is a link to nothing"),
        ("x" * 300, "cannot be used .*File name too long"),
        ("a\0b", r"a\\x00b' has a NUL character"),
        ("/proc/new", "/proc/new' cannot be written: "),
    ):
        with pytest.raises(InputError, match=message):
            check_save_directory(tmp_path / name, {})
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(InputError, match=f"no permission in '{tmp_path}'"):
        check_save_directory(tmp_path / "new" / "below", {})
    assert names_in(tmp_path) == {"file"}


def test_home_is_expanded(tmp_path, monkeypatch, llama):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_save_directory("~/runs/a", {}) == tmp_path / "runs" / "a"
    save_pretrained(llama, "~/runs/a")
    assert_same_params(load(tmp_path / "runs" / "a"), llama)
    assert_same_params(load("~/runs/a"), llama)
