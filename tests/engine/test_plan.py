"""`dpo plan`: on the demo's run, for a CPU; what it refuses."""

import json
from pathlib import Path

import pytest

from engine.cli import main
from engine.planning import planner
from engine.planning.account import take_account
from engine.planning.targets import Target

DEMO = "examples/demo/demo.yaml"
SMALLER = (
    "trainer.total_batch_size=4",
    "trainer.warmup_steps=1",
    "mixture.informs.0.num_rows=16",
    "eval_mixture.informs.0.num_rows=8",
)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])

    def run(*words):
        save = f"trainer.save_directory={tmp_path / 'out'}"
        return main(["plan", DEMO, "--target", "cpu:1", *words, *SMALLER, save])

    return run


def test_the_demo_is_planned_from_its_own_data(plan, tmp_path, capsys, monkeypatch):
    path, accounts = tmp_path / "new" / "plan.json", []

    def kept(step, target):
        accounts.append(take_account(step, target))
        return accounts[-1]

    monkeypatch.setattr(planner, "take_account", kept)
    assert plan("--json", str(path)) == 0
    out = capsys.readouterr().out
    assert "shapes       the largest batch of the run's own data" in out
    assert "memory of each device" in out and "fits: " in out
    found = json.loads(path.read_text())
    account = found["account"]
    assert account["fits"] and found["changes"] == found["sweep"] == []
    assert (account["target"], account["pairs"], account["length"]) == ("cpu:1", 4, 56)
    # The demo's answers are a part of a row: fewer tokens than rows have are scored.
    assert account["scored_capacity"] < 512

    monkeypatch.setattr(planner, "take_account", lambda *_: accounts[0])
    monkeypatch.setattr(Target, "capacity", property(lambda _: accounts[0].peak - 1))
    assert plan("--no-search") == 1
    assert "does not fit: " in capsys.readouterr().out


def test_without_data_batches_are_as_large_as_they_may_be(plan, tmp_path, monkeypatch):
    steps = []

    class Seen(Exception):
        pass

    def note(step, target):
        steps.append(step)
        raise Seen

    monkeypatch.setattr(planner, "take_account", note)
    for words in (["--no-data"], ["mixture.informs.0.data_files=missing.jsonl"]):
        with pytest.raises(Seen):
            plan(*words)
    # Of each of 8 sequences all tokens but the first, in units of 128.
    assert [step.shape for step in steps] == [(64, 512), (64, 512)]
    assert steps[0].run.plan.steps > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--target is missing: say what to plan for, such as v5e:4x4"),
        (["--target", "v9:4x4"], "there is no device 'v9'"),
        (["--target", "cpu:1", "--plot", "x.png"], "--plot has no effect without"),
        (["--target", "cpu:1", "--sweep", "--plot", "x.pdf"], "must end with .png"),
        (["--target", "cpu:99"], "JAX has 8 CPU devices in this process"),
        (
            ["--target", "cpu:2", "--no-data", "trainer.total_batch_size=3"],
            "=3 pairs cannot be split",
        ),
        (["--target", "cpu:1", "model.name_or_path=missing"], "there is no such"),
    ],
)
def test_bad_input_is_one_line_and_a_two(words, message, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main(["plan", DEMO, *words]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("dpo: error: ") and message in err[-1]


def test_a_file_that_is_no_plot_of_ours_is_refused_first(plan, tmp_path, capsys):
    path = tmp_path / "mine.png"
    path.write_text("mine")
    assert plan("--sweep", "--plot", str(path)) == 2
    assert "is not a plot of `dpo plan`" in capsys.readouterr().err
    assert path.read_text() == "mine"
