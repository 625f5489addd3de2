"""Other trainers' option names lead to ours, whatever is spelled like them."""

from typing import Any

import pytest

from engine.config.aliases import ALIASES, other_name
from engine.config.dpo import DPOConfig
from engine.config.run import RunConfig
from engine.config.run_file import RunFile, build, dotted_keys
from engine.errors import InputError

KEYS = set(dotted_keys(RunConfig))


def refusal(section: str, name: str) -> str:
    tree = {
        "model": {"name_or_path": "m"},
        "mixture": {"informs": [{"data_files": "a.csv"}]},
    }
    if section:
        tree.setdefault(section, {})[name] = 1
    else:
        tree[name] = 1
    run_file = RunFile(path="run.yaml", tree=tree, overridden=frozenset())
    with pytest.raises(InputError) as caught:
        build(RunConfig, run_file)
    return str(caught.value)


def test_every_alias_leads_to_an_option_that_there_is():
    for name, alias in ALIASES.items():
        assert alias.key in KEYS or (alias.key is None and alias.note), name
        assert name not in KEYS and f"trainer.{name}" not in KEYS
        assert not any(key.endswith(f".{name}") for key in KEYS), name


@pytest.mark.parametrize(
    "section, name, expected",
    [
        ("trainer", "max_steps", "; here it is 'trainer.max_training_steps'"),
        (
            "trainer",
            "per_device_train_batch_size",
            "; here it is 'trainer.total_batch_size' (pairs of one optimizer step over "
            "all devices and accumulation steps, not per device)",
        ),
        ("trainer", "output_dir", "; here it is 'trainer.save_directory'"),
        (
            "trainer",
            "logging_steps",
            "; here it is 'trainer.log_steps' (a whole number of optimizer steps)",
        ),
        (
            "trainer",
            "tx_mu_dtype",
            "; here it is 'trainer.mu_dtype' (float32, bfloat16 or 8bit)",
        ),
        ("trainer", "bf16", "; here it is 'model.dtype' (bfloat16 or float32)"),
        (
            "trainer",
            "optim_args",
            "; nothing here is like it: each optimizer's options are trainer's own; "
            "remove it",
        ),
        ("model", "torch_dtype", "; here it is 'model.dtype' (bfloat16 or float32)"),
        (
            "",
            "ref_model",
            "; here it is 'reference_model' (a section with name_or_path)",
        ),
        # What is ours, in another section, comes first; spelling comes last.
        ("trainer", "remat", "; did you mean 'model.remat'?"),
        ("trainer", "max_lenght", "; did you mean 'trainer.max_length'?"),
    ],
)
def test_another_trainers_name_leads_to_ours(section, name, expected):
    key = f"{section}.{name}" if section else name
    assert refusal(section, name) == f"run.yaml: unknown key {key}{expected}"


def test_spelling_of_aliases():
    assert other_name("Max-Steps") == other_name("max_steps") != ""
    assert other_name("nothing_like_it") == ""


@pytest.mark.parametrize(
    "name, expected",
    [
        ("max_steps", "max_steps: no such option; here it is 'max_training_steps'"),
        ("optim", "optim: no such option; here it is 'optimizer' (adamw, lion"),
        (
            "bf16",
            "bf16: no such option; here it is 'model.dtype' (bfloat16 or float32)",
        ),
        ("learning_rat", "learning_rat: no such option; did you mean 'learning_rate'?"),
        (
            "zzz",
            "zzz: no such option; known: beta, loss_type",
        ),
    ],
)
def test_options_from_python(name, expected):
    options: dict[str, Any] = {name: 1}
    with pytest.raises(InputError) as caught:
        DPOConfig(**options)
    assert str(caught.value).startswith(expected)
