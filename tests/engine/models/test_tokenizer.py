"""Tokenizers that cannot be loaded, and what is written of those that can."""

import io
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from engine.errors import InputError
from engine.models import save_pretrained, tokenizer
from engine.models.tokenizer import load_tokenizer
from tests.engine import tiny_tokenizers
from tests.engine.checkpoints import contents, load, names_in

MODEL = Path(__file__).parents[2] / "fixtures" / "trl" / "text" / "model"
TEXTS = ("hello world", "  two  spaces", "<s>marked</s>", "é 漢", "a\n\nb", "")
# As transformers 4 wrote them: keys, a class and a file that 5 would not write again.
V4_SETTINGS = {
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "legacy": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "</s>",
    "model_max_length": 2048,
    "tokenizer_class": "PreTrainedTokenizerFast",
}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in bfloat16 with a tokenizer as transformers 4 left it."""
    path = tmp_path / "base"
    shutil.copytree(MODEL, path)
    tensors = load_file(path / "model.safetensors")
    tensors = {n: t.astype(jnp.bfloat16) for n, t in tensors.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    special = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    for name, values in (
        ("tokenizer_config.json", V4_SETTINGS),
        ("special_tokens_map.json", special),
        ("generation_config.json", {"eos_token_id": [2, 7], "bos_token_id": 1}),
    ):
        (path / name).write_text(json.dumps(values))
    (path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    return path


def edit(path, name, **changes):
    values = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(values | changes))


def perturb(model):
    """As a step of training would."""
    model.final_norm[...] = model.final_norm[...] * 1.5


def ids(path):
    loaded = AutoTokenizer.from_pretrained(path)
    return [loaded(text)["input_ids"] for text in TEXTS]


def test_what_was_trained_with_is_what_is_written(folder, tmp_path):
    """The tokenizer's and the model's files, and what transformers makes of them."""
    (folder / "tokenization_own.py").write_text("raise SystemExit")
    before = contents(folder)
    model, loaded = load(folder), load_tokenizer(folder)
    loaded("padded", padding="max_length", truncation=True, max_length=8)
    perturb(model)
    out = tmp_path / "out"
    save_pretrained(model, out, tokenizer=loaded)
    after = contents(out)
    changed = {"model.safetensors", "config.json"}
    assert after.keys() == before.keys() - {"tokenization_own.py"}
    assert {n: after[n] for n in after.keys() - changed} == {
        n: before[n] for n in after.keys() - changed
    }
    assert ids(out) == ids(folder)
    generation = GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == [2, 7]
    assert str(AutoConfig.from_pretrained(out).dtype).endswith("bfloat16")
    old, new = (load_file(path / "model.safetensors") for path in (folder, out))
    assert {t.dtype for t in new.values()} == {np.dtype(jnp.bfloat16)}
    (norm,) = [name for name in new if not np.array_equal(new[name], old[name])]
    assert norm == "model.norm.weight"


def test_another_model_s_tokenizer(folder, tmp_path):
    """Files of the tokenizer's folder, and none of the model's own tokenizer."""
    theirs = tmp_path / "tokenizer"
    theirs.mkdir()
    tiny_tokenizers.make("ab", adds_bos=True).save_pretrained(theirs)
    out = tmp_path / "out"
    save_pretrained(load(folder), out, tokenizer=load_tokenizer(theirs))
    assert names_in(out) == {
        *names_in(theirs),
        "model.safetensors",
        "config.json",
        "generation_config.json",
    }
    assert contents(theirs).items() <= contents(out).items()
    assert ids(out) == ids(theirs)
    # Its files are taken away again by a save that has others.
    save_pretrained(load(folder), out, tokenizer=load_tokenizer(folder))
    assert names_in(out) == names_in(folder)


def test_a_tokenizer_made_in_python_is_written_by_transformers(folder, tmp_path):
    made = tiny_tokenizers.make("ab")
    save_pretrained(load(folder), tmp_path / "out", tokenizer=made)
    assert ids(tmp_path / "out") == [made(text)["input_ids"] for text in TEXTS]


def add_a_token(loaded):
    loaded.add_tokens(["<new>"])


def change_the_template(loaded):
    loaded.chat_template = "{{ messages[0]['content'] }}"


def name_another_eos(loaded):
    loaded.eos_token = "<s>"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (add_a_token, "added tokens"),
        (change_the_template, "chat template"),
        (name_another_eos, "special tokens"),
    ],
)
def test_a_tokenizer_that_was_changed_is_written_as_it_is(
    folder, tmp_path, caplog, change, named
):
    loaded = load_tokenizer(folder)
    change(loaded)
    save_pretrained(load(folder), tmp_path / "out", tokenizer=loaded)
    (record,) = caplog.records
    assert named in record.getMessage()
    again = load_tokenizer(tmp_path / "out")
    assert again.get_vocab() == loaded.get_vocab()
    assert again.chat_template == loaded.chat_template
    assert again.eos_token == loaded.eos_token
    assert not (tmp_path / "out" / "tokenizer.model").exists()


def test_a_folder_that_changed_during_training(folder, tmp_path, caplog):
    loaded = load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    save_pretrained(load(folder), tmp_path / "out", tokenizer=loaded)
    assert "anew" in caplog.text
    want = [loaded(text)["input_ids"] for text in TEXTS]
    assert ids(tmp_path / "out") == want


@pytest.mark.parametrize(
    ("class_name", "warns"), [("LlamaTokenizer", True), ("TokenizersBackend", False)]
)
def test_a_class_that_overrules_its_file_is_told_of(folder, caplog, class_name, warns):
    """transformers 5's LlamaTokenizer puts a space in front, whatever the file says."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "T": 4, "w": 5, "o": 6}
    model = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    never = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    model.pre_tokenizer = never  # pyright: ignore
    model.save(str(folder / "tokenizer.json"))
    edit(folder, "tokenizer_config.json", tokenizer_class=class_name, unk_token="<unk>")
    loaded = load_tokenizer(folder)
    assert (loaded("Two")["input_ids"][-3:-1] == [4, 5]) and (
        (3 in loaded("Two")["input_ids"]) == warns
    )
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("engine")]
    assert len(lines) == warns
    assert all("its tokens of 'Two words' are [4, 5, 6, 3, 5, 6" in x for x in lines)


def test_a_special_token_that_is_not_in_the_vocabulary_is_told_of(folder, caplog):
    """And a model_max_length below the probes' lengths is no reason to speak."""
    (folder / "special_tokens_map.json").unlink()
    edit(folder, "tokenizer_config.json", eos_token="<|nowhere|>", model_max_length=2)
    loaded = load_tokenizer(folder)
    (line,) = [record.getMessage() for record in caplog.records]
    assert (
        f"not in the vocabulary: eos_token='<|nowhere|>' (id {len(loaded) - 1})" in line
    )
    caplog.clear()
    listed = {str(len(loaded) - 1): {"content": "<|nowhere|>", "special": True}}
    edit(folder, "tokenizer_config.json", added_tokens_decoder=listed)
    load_tokenizer(folder)
    assert not caplog.records


def drop(name):
    return lambda path: (path / name).unlink()


def write(name, content, without=()):
    def change(path):
        for other in without:
            (path / other).unlink(missing_ok=True)
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
        else:
            (path / name).write_text(json.dumps(content))

    return change


def of_a_later_version(path):
    values = json.loads((path / "tokenizer.json").read_text())
    edit(path, "tokenizer.json", model=values["model"] | {"type": "BPE9"})


BOTH = ("tokenizer.json", "tokenizer.model")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (write("x", b"", BOTH), "there is no tokenizer; it needs tokenizer.json"),
        (of_a_later_version, "tokenizer.json: tokenizers .* cannot read it .*install"),
        (write("tokenizer.json", b""), "tokenizer.json: not JSON"),
        (write("tokenizer.json", []), "tokenizer.json: must be a JSON object"),
        (write("tokenizer.json", b'{"a": "\xe9"}'), "tokenizer.json: not JSON .*utf-8"),
        (write("tokenizer.json", {}), "tokenizer.json: .*newer version or damaged"),
        (drop("tokenizer.json"), "tokenizer.model: needs the package sentencepiece"),
        (
            write("tokenizer.model", b"aGk= 0\neQ== 1\n", ["tokenizer.json"]),
            "tokenizer.model: needs the package tiktoken",
        ),
        (
            write("qwen.tiktoken", b"aGk= 0\n", BOTH),
            "qwen.tiktoken: needs the package tiktoken",
        ),
        (
            write("tekken.json", {}, BOTH),
            "tekken.json: needs the package mistral-common",
        ),
        (write("vocab.json", {"a": 0}, BOTH), "vocab.json needs a merges.txt"),
        (write("tokenizer_config.json", []), "tokenizer_config.json: must be a JSON"),
        (write("special_tokens_map.json", b"{"), "special_tokens_map.json: not JSON"),
        (write("added_tokens.json", b"{"), "added_tokens.json: not JSON"),
        (write("chat_template.jinja", b"\xff"), "chat_template.jinja: not UTF-8"),
        (write("config.json", b"{"), "config.json.*not a valid JSON file"),
        (
            lambda path: edit(path, "config.json", hidden_size="x"),
            "config.json: transformers cannot read it .*'hidden_size'",
        ),
        (
            lambda path: edit(path, "tokenizer_config.json", model_max_length="x"),
            "tokenizer_config.json: model_max_length='x' must be a number",
        ),
        (
            lambda path: edit(path, "special_tokens_map.json", eos_token=5),
            "cannot be loaded .*eos_token has to be",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_read(folder, monkeypatch, spoil, message):
    # As on a machine without them, which is what a newcomer has.
    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda name: None)
    spoil(folder)
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(folder)
    text = str(error.value)
    assert str(folder) in text and "\n" not in text
    assert (
        "model.tokenizer" in text
        or "not JSON" in text
        or "UTF-8" in text
        or "must be a" in text
    )


def test_no_code_of_a_checkpoint_runs_and_nothing_asks(
    folder, tmp_path, monkeypatch, capsys
):
    """Neither the tokenizer's nor the config's, though standard input says yes."""
    witness = tmp_path / "it-ran"
    code = f"open({str(witness)!r}, 'w')\nclass Own: pass\n"
    (folder / "own.py").write_text(code)
    edit(
        folder,
        "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["own.Own", "own.Own"]},
    )
    edit(
        folder,
        "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    for read in (load_tokenizer, load):
        with pytest.raises(InputError, match="code that comes with .* never run"):
            read(folder)
    assert not witness.exists() and "[y/N]" not in capsys.readouterr().out
