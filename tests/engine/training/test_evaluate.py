"""`dpo evaluate`: the metrics are training's own, and no training state is needed."""

import json
from pathlib import Path

import pytest

from engine.cli import main
from engine.commands.evaluate import trained
from engine.config.run import load_run_config
from engine.training.evaluator import Evaluator
from tests.engine.training.runs import FIXTURE, SHORT, make_trainer

pytestmark = pytest.mark.usefixtures("shared_programs")

TRAINED = str(FIXTURE.parents[1] / "trl_lora" / "trained" / "trained")
CHAT = FIXTURE.parent / "chat"
MODEL = str(CHAT / "model")


def test_pair_by_pair_the_means_are_those_of_training(tmp_path):
    rows = [row | {"weight": 0.5 + i % 3} for i, row in enumerate(SHORT)]
    trainer = make_trainer(
        tmp_path,
        eval_dataset=rows,
        sizes=(2, 1, 1, 2),
        loss_type=("sigmoid", "aot"),
        max_training_steps=2,
    )
    trainer.train()
    expected = trainer.evaluate()
    plans = trainer.run.eval_plans
    (prefix,) = plans
    evaluator = Evaluator(
        trainer.arguments, trainer.model, trainer._reference, plans.values()
    )
    found = evaluator.estimate(plans[prefix])
    names = {f"{prefix}{name}" for name in found}
    assert names == set(expected) - {f"{prefix}perf/seconds", f"{prefix}num_tokens"}
    assert f"{prefix}loss/aot" in names
    assert expected[f"{prefix}rewards/margins"] != 0
    for name, (mean, low, high) in found.items():
        # Both are float32 sums of the same numbers in another order; logits and
        # log-probabilities of an answer are below 100 in size.
        assert mean == pytest.approx(expected[prefix + name], rel=2e-5, abs=2e-5), name
        assert low is not None and high is not None and low <= mean <= high


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = f"{{type: json, data_files: {CHAT / 'data.jsonl'}}}"
    Path("run.yaml").write_text(
        f"config:\n  model: {{name_or_path: {CHAT / 'model'}, dtype: float32}}\n"
        f"  mixture: {{informs: [{source}]}}\n"
        f"  eval_mixture: {{informs: [{source}]}}\n"
        "  sharding: {data: 1, fsdp: 1, tensor: -1}\n"
        "  trainer: {total_batch_size: 8, save_directory: out}\n"
    )
    return "run.yaml"


def test_an_adapter_from_the_command_line(run_file, capsys):
    words = [run_file, "--model", TRAINED, "sharding={data: 8}"]
    assert main(["evaluate", *words, "--output", "numbers.json"]) == 0
    printed = capsys.readouterr().out
    record = json.loads(Path("numbers.json").read_text())
    assert record["reference"] == MODEL
    (found,) = record["sets"].values()
    metrics = found["metrics"]
    # It was trained on these pairs.
    margins = metrics["rewards/margins"]
    assert 0 < margins["low"] < margins["mean"] < margins["high"]
    accuracy = metrics["rewards/accuracies"]
    assert 0.5 < accuracy["mean"] <= accuracy["high"] <= 1
    assert f"eval: {found['pairs']} pairs" in printed
    assert f"rewards/margins {margins['mean']:.5g} " in " ".join(printed.split())
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "save_directory='out' has no trained model; train first, or name a"),
        (["eval_mixture=null"], "the run file has no eval_mixture"),
        (["--model", "no/such"], "no/such"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(run_file, capsys, words, said):
    assert main(["evaluate", run_file, *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dpo: error: ") and said in error
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "overrides, source, reference",
    [
        ([], MODEL, (MODEL, None)),
        (["lora={}"], TRAINED, (MODEL, None)),
        ([f"lora.adapter={TRAINED}"], TRAINED, (MODEL, TRAINED)),
        (["reference_model.name_or_path=r"], MODEL, ("r", None)),
        (["trainer.reference_free=true"], MODEL, None),
        (["trainer.sync_ref_model=true", "trainer.ref_model_sync_steps=2"],
         MODEL, (MODEL, None)),
    ],
)  # fmt: skip
def test_the_reference_is_the_runs(run_file, overrides, source, reference):
    run = trained(load_run_config(run_file, overrides), source, with_reference=True)
    given = run.reference_model
    assert (given and (given.name_or_path, given.adapter)) == reference
    adapter = run.lora and run.lora.adapter
    assert adapter == (source if source == TRAINED else None)
    assert run.model.name_or_path == MODEL
    assert not run.trainer.sync_ref_model
