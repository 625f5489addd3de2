"""A run in two processes is the run of one, whatever becomes of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cli import main
from engine.training.checkpoints import Store
from tests import environment
from tests.engine.training.runs import FIXTURE
from tests.json_lines import read_lines

ROOT = Path(__file__).parents[3]
STEPS = 18
RUN = f"""\
config:
  model: {{name_or_path: '{FIXTURE}/model', dtype: float32}}
  mixture: {{informs: [{{data_files: '{FIXTURE}/data.jsonl'}}]}}
  trainer:
    total_batch_size: 8
    max_length: 24
    num_train_epochs: 20
    max_training_steps: {STEPS}
    log_steps: 1
    save_steps: 3
    learning_rate: 1e-4
    progress_bar: false
    use_tensorboard: false
"""
# Metrics are sums of some tens of nats, or differences of such; a run's own rounding
# goes into its next steps.
CLOSE = 64 * 2.0**-23 * 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes")
    (path / "run.yaml").write_text(RUN)
    return path


@pytest.fixture(scope="module")
def runs(folder):
    """What became of each run in two processes: see `paired_runs`."""
    programs = environment.compilation_cache(ROOT)
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": environment.xla_flags(f"{environment.DEVICES}=2"),
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # and other rounding, as elsewhere
    }
    words = [sys.executable, "-m", "tests.engine.training.paired_runs", "run.yaml"]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def alone(folder):
    """The metrics of one process, of twice as many devices: eight."""
    return train(folder, "alone")


def train(folder, name, *words):
    output = f"trainer.save_directory={folder / name}"
    assert main(["train", str(folder / "run.yaml"), output, *words]) == 0
    return read_lines(folder / name / "metrics.jsonl")


def assert_same_run(got, want):
    assert [line["step"] for line in got] == list(range(1, STEPS + 1))
    for mine, theirs in zip(got, want, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            # (Which of two equal margins is larger is for rounding to say.)
            if not name.startswith("perf/") and not name.endswith("accuracies"):
                assert abs(mine[name] - theirs[name]) <= CLOSE, (name, mine["step"])
        assert mine["perf/scored_fraction"] == theirs["perf/scored_fraction"]


def test_two_processes_give_the_metrics_of_one_whatever_happens(folder, runs, alone):
    last = runs["left alone"]
    assert last["codes"] == [0, 0], last["said"]
    assert "4 devices, 2 processes" in last["said"][0]
    assert_same_run(read_lines(folder / "pair" / "metrics.jsonl"), alone)
    assert (folder / "pair" / "model.safetensors").is_file()
    # Process 0 alone says what all do.
    assert last["said"][1].count("\n") <= 1 + last["said"][1].count("[Gloo]")


def test_where_a_process_is_killed_the_other_ends_and_says_why(runs):
    run = runs["killed"]
    assert run["codes"] == [4, -9]
    assert run["seconds"] < 30
    assert run["lines"] < STEPS
    *_, words = run["said"][0].strip().splitlines()
    assert re.match(
        "dpo: error: .*process 1 of 2 has gone without a word: killed, or out of "
        "memory; see its own output; nothing that was saved is damaged: start all "
        "processes again with the same command",
        words,
    )
    # What the next run goes on from is whole.
    assert "going on from the checkpoint of step 3\n" in runs["stopped"]["said"][0]


def test_a_signal_to_one_process_stops_all_at_one_checkpoint(folder, runs):
    run = runs["stopped"]
    assert run["codes"] == [143, 143]
    assert "SIGTERM: finishing this step and saving" in run["said"][1]
    ending = rf"stopped after step (\d+) of {STEPS}; the same command goes on"
    found = {step for said in run["said"] for step in re.findall(ending, said)}
    (step,) = map(int, found)
    store = Store(folder / "stopped", None)
    assert store.newest() == (step, [])
    assert len(read_lines(folder / "stopped" / "metrics.jsonl")) == step
    said = runs["left alone"]["said"][0]
    assert f"going on from the checkpoint of step {step}\n" in said


def test_one_process_of_another_mesh_goes_on_with_what_two_began(folder, runs, alone):
    assert runs["stopped"]["codes"] == [143, 143]
    sizes = (f"sharding.{x}=2" for x in ("data", "tensor", "sequence"))
    assert_same_run(train(folder, "stopped", *sizes), alone)


def test_processes_that_were_not_given_the_same_are_refused(folder, runs):
    run = runs["differ"]
    assert run["codes"] == [2, 2]
    for said in run["said"]:
        assert said.endswith(
            "dpo: error: the processes of this run differ: trainer.beta is 0.2 in "
            "process 1 and 0.1 in process 0; start all processes with the same\n"
        )
    assert not (folder / "differ").exists()
