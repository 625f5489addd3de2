"""The trainer as its users meet it: the tutorial, files, evaluation."""

import importlib.machinery
import json
import shutil
import sys
import types
from pathlib import Path

import datasets
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from engine import DPOConfig, DPOTrainer, InputError, load_model
from engine.cli import main
from engine.parallel.sharding import make_mesh
from tests.engine.tutorial import TUTORIAL

FIXTURE = Path(__file__).parents[2] / "fixtures" / "trl" / "text"
ROWS = [json.loads(line) for line in (FIXTURE / "data.jsonl").read_text().splitlines()]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_trainer(directory: Path, evaluate: bool = True, **settings) -> DPOTrainer:
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    defaults = {"total_batch_size": 4, "learning_rate": 1e-3, "log_steps": 2}
    return DPOTrainer(
        model=load_model(FIXTURE / "model", mesh=mesh, dtype="float32"),
        arguments=DPOConfig(save_directory=str(directory), **defaults | settings),
        train_dataset=ROWS,
        eval_dataset=ROWS[:6] if evaluate else None,
        processing_class=AutoTokenizer.from_pretrained(FIXTURE / "model"),
    )


def test_the_tutorials_yaml_runs_as_it_stands(tmp_path, monkeypatch):
    """The names in it are directories here, as they are where there is no network."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURE / "model", "meta-llama/Llama-3.1-8B-Instruct")
    folder = Path("trl-lib/ultrafeedback_binarized")
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "train-00000.parquet")
    Path("dpo.yaml").write_text(TUTORIAL)
    assert main(["--config", "dpo.yaml"]) == 0
    lines = read_lines(Path("dpo_checkpoints/metrics.jsonl"))
    assert lines[-1]["step"] == 6  # 19 pairs, 16 a batch, three epochs
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
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    latest = trainer.train()
    assert np.isfinite(latest["loss"])
    assert (tmp_path / "config.json").exists()


def test_lines_of_metrics_and_evaluations(tmp_path):
    make_trainer(tmp_path, log_steps=2, eval_steps=3, num_train_epochs=1).train()
    lines = read_lines(tmp_path / "metrics.jsonl")
    found = [(line["step"], "eval_loss" in line) for line in lines]
    # A line every two steps and the rest at the end; an evaluation every three steps
    # and at the end. 21 pairs make six steps.
    assert found == [(2, False), (3, True), (4, False), (6, False), (6, True)]
    trained = {"perf/step_seconds", "perf/tokens_per_second", "perf/scored_fraction"}
    assert trained <= lines[0].keys()
    assert 0 < lines[0]["perf/scored_fraction"] < 1
    assert lines[-2]["num_tokens"] == lines[-1]["eval_num_tokens"] > 0


def test_a_run_can_be_repeated_to_the_bit(tmp_path):
    """Shuffled by the seed; another seed gives another order."""
    trainers = [
        make_trainer(tmp_path / str(i), evaluate=False, seed=seed, max_training_steps=3)
        for i, seed in enumerate((1, 1, 2))
    ]
    orders = [trainer.plan.order(0).tolist() for trainer in trainers]
    assert orders[0] == orders[1] != orders[2]
    assert trainers[0].train()["loss"] == trainers[1].train()["loss"]


def test_max_training_steps_also_ends_the_schedule(tmp_path):
    make_trainer(tmp_path, evaluate=False, max_training_steps=4, log_steps=1).train()
    rates = [line["learning_rate"] for line in read_lines(tmp_path / "metrics.jsonl")]
    np.testing.assert_allclose(rates, [1e-3, 0.75e-3, 0.5e-3, 0.25e-3], rtol=1e-6)


def test_the_model_holds_the_trained_parameters_and_evaluates(tmp_path):
    trainer = make_trainer(tmp_path, max_training_steps=2)
    before = np.asarray(trainer.model.embed[...])
    assert trainer.evaluate()["eval_rewards/margins"] == 0
    trainer.train()
    assert (np.asarray(trainer.model.embed[...]) != before).any()
    assert trainer.evaluate()["eval_rewards/margins"] != 0


def test_a_synced_reference_follows(tmp_path):
    """A copy of the policy after every step: the next step starts at margin 0."""
    make_trainer(
        tmp_path,
        evaluate=False,
        sync_ref_model=True,
        ref_model_sync_steps=1,
        ref_model_mixup_alpha=1.0,
        max_training_steps=3,
        log_steps=1,
    ).train()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["rewards/margins"] for line in lines] == [0, 0, 0]
    assert len({line["logps/chosen"] for line in lines}) == 3


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_metrics(tmp_path):
    trainer = make_trainer(tmp_path, evaluate=False, learning_rate=1e30, log_steps=1)
    with pytest.raises(InputError, match="the loss is nan; lower learning_rate"):
        trainer.train()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(np.log(2)) and lines[-1]["loss"] is None


def test_evaluation_without_data_is_refused(tmp_path):
    with pytest.raises(InputError, match="eval_steps=5 has no effect without"):
        make_trainer(tmp_path, evaluate=False, eval_steps=5)
    trainer = make_trainer(tmp_path, evaluate=False)
    with pytest.raises(InputError, match="needs an eval_dataset"):
        trainer.evaluate()


def test_wandb_gets_the_lines(tmp_path, monkeypatch):
    seen = []
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    run = types.SimpleNamespace(
        log=lambda line, step: seen.append((step, line["loss"])),
        finish=lambda: seen.append("finished"),
    )
    monkeypatch.setattr(wandb, "init", lambda **kwargs: run, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    make_trainer(
        tmp_path, evaluate=False, use_wandb=True, max_training_steps=2, log_steps=1
    ).train()
    assert [entry[0] for entry in seen[:2]] == [1, 2] and seen[2] == "finished"


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
