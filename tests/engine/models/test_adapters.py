"""PEFT's files: what is read, refused and written; and adapters merged into weights."""

import json
import logging
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.cli import main
from engine.errors import InputError
from engine.models import check_adapter, load_adapter, load_model, save_pretrained
from engine.models.adapter import LINEARS
from engine.models.checkpoint import read_config
from engine.models.generate import full_logits
from engine.parallel.sharding import make_mesh
from tests.engine.tiny_models import one_device, random_tokens

FIXTURES = Path(__file__).parents[2] / "fixtures"
BASE = FIXTURES / "trl" / "chat" / "model"
ADAPTER = FIXTURES / "trl_lora" / "trained" / "trained"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."


@pytest.fixture
def adapter(tmp_path):
    """Makes a copy of the fixture with other options and tensors."""

    def make(change=None, **options):
        target = tmp_path / "adapter"
        shutil.copytree(ADAPTER, target)
        values = json.loads((target / CONFIG).read_text()) | options
        (target / CONFIG).write_text(json.dumps(values))
        if change is not None:
            tensors = load_file(target / WEIGHTS)
            change(tensors)
            save_file(tensors, target / WEIGHTS)
        return target

    return make


def check(directory, base="model"):
    return check_adapter(directory, read_config(BASE), base)


def refusal(directory):
    with pytest.raises(InputError) as caught:
        check(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"fan_in_fan_out": True},
        {"layers_to_transform": [0]},
        {"trainable_token_indices": [1, 2]},
        {"lora_bias": True},
        {"exclude_modules": ["o_proj"]},
        {"target_parameters": ["experts.down_proj"]},
        {"layer_replication": [[0, 1]]},
        {"megatron_config": {"a": 1}},
        {"use_qalora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"alora_invocation_tokens": [3]},
        {"an_option_of_tomorrow": 1},
    ],
    ids=lambda option: "-".join(option),
)
def test_an_option_that_changes_the_result_is_refused_by_name(adapter, option):
    directory = adapter(**option)
    ((name, value),) = option.items()
    expected = f"{directory / CONFIG}: {name}={value!r} is not supported, as it changes"
    assert refusal(directory).startswith(expected)


@pytest.mark.parametrize(
    "option, expected",
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported; allowed: LORA"),
        ({"r": "4"}, "r='4' must be an integer above 0"),
        ({"lora_alpha": -1}, "lora_alpha=-1 must be a finite number above 0"),
        ({"use_rslora": "yes"}, "use_rslora='yes' must be true or false"),
        ({"target_modules": None}, "target_modules=None must be a list of modules'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "selects lm_head, which can have"),
        ({"target_modules": ["embed_tokens"]}, "selects embed_tokens, which can have"),
        ({"target_modules": ["qkv_proj"]}, "selects qkv_proj, which can have no adap"),
        ({"target_modules": ".*(_proj|lm_head)"}, "selects lm_head, which can have"),
        ({"target_modules": "nothing.*"}, "selects nothing, which can have no adapter"),
        ({"target_modules": "("}, "target_modules='(' is no pattern: "),
        (
            {"target_modules": ["layers.1.self_attn.q_proj"]},
            "selects q_proj in 1 of 2 layers; an adapter is in all or in none",
        ),
    ],
    ids=str,
)
def test_a_wrong_value_is_one_line(adapter, option, expected):
    directory = adapter(**option)
    message = refusal(directory)
    assert message.startswith(f"{directory / CONFIG}: ") and expected in message


@pytest.mark.parametrize(
    "targets, modules",
    [
        ("all-linear", tuple(LINEARS)),
        (r".*\.self_attn\.(q|o)_proj", ("q_proj", "o_proj")),
        (["self_attn.v_proj", "down_proj"], ("v_proj", "down_proj")),
    ],
    ids=str,
)
def test_targets_are_read_as_peft_reads_them(adapter, targets, modules):
    def keep(tensors):
        for name in list(tensors):
            if not any(f".{module}." in name for module in modules):
                del tensors[name]

    assert check(adapter(keep, target_modules=targets)).modules == modules


def test_tensors_that_do_not_fit(adapter):
    layer = "model.layers.{}.self_attn."

    def change(tensors):
        del tensors[PREFIX + layer.format(0) + "q_proj.lora_A.weight"]
        tensors["model.norm.lora_A.weight"] = np.zeros((3, 2), np.float32)
        tensors[PREFIX + layer.format(1) + "k_proj.lora_B.weight"] = np.zeros(
            (3, 3), np.float32
        )

    message = refusal(adapter(change))
    assert "tensors do not match adapter_config.json and the model (llama): " in message
    assert f"missing: {layer.format(0)}q_proj.lora_A.weight; " in message
    assert "extra: model.norm.lora_A.weight; " in message
    assert f"{layer.format(1)}k_proj.lora_B.weight is (3, 3), not (16, 3)" in message


def test_without_its_file(adapter):
    directory = adapter()
    (directory / WEIGHTS).rename(directory / "adapter_model.bin")
    assert "adapter_model.bin is pickled, which runs code" in refusal(directory)
    (directory / "adapter_model.bin").unlink()
    assert refusal(directory) == (
        f"{directory}: no adapter_model.safetensors; fetch the adapter again"
    )
    (directory / CONFIG).unlink()
    assert refusal(directory).startswith(f"{directory / CONFIG}: missing")


def test_names_without_peft_s_prefix(adapter):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix(PREFIX)] = tensors.pop(name)

    assert check(adapter(strip)) == check(ADAPTER)


def test_another_base_is_told_of(caplog):
    with caplog.at_level(logging.WARNING):
        check(ADAPTER, base="somewhere/model")
        assert not caplog.messages
        check(ADAPTER, base="org/another")
    (message,) = caplog.messages
    assert message.endswith("was made for model, and is put on org/another")


def test_what_is_saved_is_what_was_read(tmp_path):
    base = load_model(BASE, mesh=make_mesh(2, 2, 2), dtype="float32")
    model = load_adapter(base, ADAPTER)
    save_pretrained(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    got, want = load_file(tmp_path / WEIGHTS), load_file(ADAPTER / WEIGHTS)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)
    ours, theirs = (json.loads((d / CONFIG).read_text()) for d in (tmp_path, ADAPTER))
    theirs["target_modules"] = list(LINEARS)
    assert ours == {name: theirs[name] for name in ours}
    # A later save of a whole model takes its place, and the other way round.
    save_pretrained(load_model(BASE, mesh=one_device()), tmp_path)
    assert not (tmp_path / WEIGHTS).exists() and (tmp_path / "config.json").exists()
    save_pretrained(model, tmp_path, dtype="bfloat16")
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
    dtypes = {x.dtype for x in load_file(tmp_path / WEIGHTS).values()}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}


def test_pefts_adapter_is_not_overwritten(adapter):
    directory = adapter()
    model = load_model(BASE, mesh=one_device(), dtype="float32")
    with pytest.raises(InputError, match=f"has {CONFIG}|has {WEIGHTS}"):
        save_pretrained(load_adapter(model, ADAPTER), directory)


def test_export_merges(tmp_path, capsys):
    arguments = ["export", "--merge", str(ADAPTER), str(tmp_path / "merged")]
    assert main(arguments) == 2  # the fixture's base is called "model"
    assert "model 'model': there is no such directory" in capsys.readouterr().err
    assert main([*arguments, "--model", str(BASE)]) == 0
    merged = load_model(tmp_path / "merged", mesh=one_device(), dtype="float32")
    base = load_model(BASE, mesh=one_device(), dtype="float32")
    tokens = jnp.asarray(random_tokens(2, 9))
    plain = full_logits(base, tokens)
    want = full_logits(load_adapter(base, ADAPTER), tokens)
    got = full_logits(merged, tokens)
    scale = jnp.abs(want).max()
    assert jnp.abs(got - want).max() < 1e-5 * scale < 1e-3 * jnp.abs(plain - want).max()
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    assert main([*arguments[:3], str(ADAPTER), "--model", str(BASE)]) == 2
    assert "is the directory of --merge" in capsys.readouterr().err
