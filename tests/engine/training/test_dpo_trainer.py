"""The trainer as its users meet it: the tutorial, and what is refused."""

import shutil
from pathlib import Path

import datasets
import jax
import jaxtyping
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from engine import DPOConfig, DPOTrainer, InputError, load_model
from engine.cli import main
from tests.engine.training.runs import (
    FIXTURE,
    ONE_SHAPE,
    ROWS,
    make_trainer,
    one_device,
)
from tests.engine.tutorial import TUTORIAL
from tests.json_lines import read_lines

pytestmark = pytest.mark.usefixtures("shared_programs")


def test_the_tutorials_yaml_runs_as_it_stands(tmp_path, monkeypatch):
    """The names in it are directories here, as they are where there is no network."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURE / "model", "meta-llama/Llama-3.1-8B-Instruct")
    folder = Path("trl-lib/ultrafeedback_binarized")
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(ONE_SHAPE).to_parquet(folder / "train-00000.parquet")
    Path("dpo.yaml").write_text(TUTORIAL)
    assert main(["--config", "dpo.yaml"]) == 0
    lines = read_lines(Path("dpo_checkpoints/metrics.jsonl"))
    assert lines[-1]["step"] == 6  # 21 pairs, 16 a batch, three epochs
    assert lines[-1]["epoch"] == 3.0
    trained = load_file("dpo_checkpoints/model.safetensors")
    before = load_file(FIXTURE / "model" / "model.safetensors")
    assert trained.keys() == before.keys()
    assert any((trained[name] != before[name]).any() for name in trained)
    AutoTokenizer.from_pretrained("dpo_checkpoints")


def test_python_as_in_the_tutorial(tmp_path):
    name = str(FIXTURE / "model")
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    config = DPOConfig(
        model_name="dpo_example",
        save_directory=str(tmp_path),
        beta=0.1,
        loss_type="sigmoid",
        max_length=2048,
        max_prompt_length=1024,
        total_batch_size=16,
        learning_rate=1e-6,
        num_train_epochs=1,
    )
    trainer = DPOTrainer(
        model=load_model(name),
        reference_model=load_model(name),
        arguments=config,
        train_dataset=datasets.Dataset.from_list(ONE_SHAPE),
        processing_class=tokenizer,
    )
    latest = trainer.train()
    assert np.isfinite(latest["loss"])
    assert (tmp_path / "config.json").exists()


def test_evaluation_without_data_is_refused(tmp_path):
    with pytest.raises(InputError, match="eval_steps=5 has no effect without"):
        make_trainer(tmp_path, evaluate=False, eval_steps=5)
    trainer = make_trainer(tmp_path, evaluate=False)
    with pytest.raises(InputError, match="needs an eval_dataset"):
        trainer.evaluate()


def test_a_warm_up_that_never_ends_is_refused(tmp_path):
    with pytest.raises(InputError, match="warmup_steps=18 must be less than .* 18"):
        make_trainer(tmp_path, evaluate=False, warmup_steps=18)


def test_more_steps_than_can_be_counted_are_refused(tmp_path):
    """Even where a warm-up of as many could end."""
    most = 2**31 - 1
    with pytest.raises(InputError, match="makes 12884901882 steps, which must be bel"):
        make_trainer(tmp_path, evaluate=False, num_train_epochs=most, warmup_steps=most)
    make_trainer(tmp_path, evaluate=False, num_train_epochs=most, max_training_steps=9)


@pytest.fixture
def unchecked():
    """As for a user: annotations are checked under pytest only."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_a_reference_by_its_path_computes_as_the_policy_does(tmp_path):
    """In float32, so that rewards start at 0 to float32's rounding."""
    trainer = make_trainer(
        tmp_path,
        reference_model=str(FIXTURE / "model"),
        max_training_steps=1,
    )
    metrics = trainer.evaluate()
    bound = 0.1 * 4 * np.finfo(np.float32).eps * abs(metrics["eval_logps/chosen"])
    assert abs(metrics["eval_rewards/chosen"]) <= bound


def test_a_reference_computes_in_its_own_dtype(tmp_path):
    """Rewards then start as far from 0 as its rounding is: less than 2**-8 of logps."""
    other = load_model(FIXTURE / "model", mesh=one_device(), dtype="bfloat16")
    trainer = make_trainer(tmp_path, reference_model=other)
    operands = jax.tree.leaves(trainer._reference.operands)
    assert {x.dtype.name for x in operands} == {"bfloat16"}
    metrics = trainer.evaluate()
    bound = 0.1 * 2**-8 * abs(metrics["eval_logps/chosen"])
    assert 1e-5 < abs(metrics["eval_rewards/chosen"]) < bound


def test_what_can_be_refused_is_before_weights_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.training.dpo_trainer.load_model", None)
    with pytest.raises(InputError, match="warmup_steps=90"):
        DPOTrainer(
            model=FIXTURE / "model",
            arguments=DPOConfig(warmup_steps=90, save_directory=str(tmp_path)),
            train_dataset=ROWS,
            processing_class=AutoTokenizer.from_pretrained(FIXTURE / "model"),
        )


def test_weights_are_saved_in_the_dtype_that_is_asked_for(tmp_path):
    make_trainer(
        tmp_path, evaluate=False, max_training_steps=1, save_dtype="float16"
    ).train()
    saved = load_file(tmp_path / "model.safetensors")
    assert {x.dtype for x in saved.values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize(
    "name, value, way",
    [
        ("arguments", {"beta": 0.1}, "engine.DPOConfig"),
        ("processing_class", str(FIXTURE / "model"), "AutoTokenizer"),
        ("model", object(), "load_model"),
        ("reference_model", 7, "load_model"),
    ],
)
def test_an_argument_that_is_something_else(name, value, way, unchecked):
    given = {
        "model": FIXTURE / "model",
        "arguments": DPOConfig(),
        "train_dataset": ROWS,
        "processing_class": AutoTokenizer.from_pretrained(FIXTURE / "model"),
    }
    with pytest.raises(InputError, match=f"{name} is a .*{way}"):
        DPOTrainer(**given | {name: value})


def test_validate_prints_what_would_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = f"{{type: json, data_files: {FIXTURE / 'data.jsonl'}}}"
    Path("run.yaml").write_text(
        f"config:\n  model: {{name_or_path: {FIXTURE / 'model'}}}\n"
        f"  mixture: {{informs: [{source}]}}\n"
        "  trainer: {total_batch_size: 16, max_length: 36}\n"
    )
    assert main(["validate", "run.yaml"]) == 0
    printed = capsys.readouterr().out
    assert "20 pairs, 1 dropped" in printed
    assert "6, 2 an epoch" in printed and printed.endswith("valid\n")
    assert not Path("dpo_checkpoints").exists()
