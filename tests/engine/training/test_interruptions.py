"""Signals that end a run, in good order or not, and how it goes on."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.errors import Interrupted
from engine.training.events import Listener
from tests import environment
from tests.engine.training.runs import FIXTURE, make_trainer
from tests.engine.training.test_checkpoints import lines, settings, weights

pytestmark = pytest.mark.usefixtures("shared_programs")

ROOT = Path(__file__).parents[3]
RUN = """\
config:
  model: {{name_or_path: '{fixture}/model', dtype: float32}}
  mixture: {{informs: [{{data_files: '{fixture}/data.jsonl'}}]}}
  trainer:
    total_batch_size: 2
    max_length: 16
    max_prompt_length: 8
    num_train_epochs: 20
    max_training_steps: 80
    log_steps: 3
    save_steps: 4
    learning_rate: 1e-3
    progress_bar: false
"""


def child(words: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """A process of one CPU device."""
    flags = environment.xla_flags(f"{environment.DEVICES}=1")
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    return subprocess.run(
        [sys.executable, *words], cwd=directory, env=env, capture_output=True, text=True
    )


def test_a_run_that_is_killed_at_random_ends_as_one_that_is_not(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN.format(fixture=FIXTURE))
    words = ["-m", "tests.engine.training.killed_runs", "run.yaml", "3", "0"]
    done = child(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == 3
    assert "going on from the checkpoint of step" in done.stderr
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert lines(killed) == lines(whole)
    assert lines(killed)[-1]["step"] == 80
    names = ("model.safetensors", "config.json")
    assert all((killed / x).read_bytes() == (whole / x).read_bytes() for x in names)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_lets_the_step_end_and_saves(tmp_path, number, code, caplog):
    class Ask(Listener):
        def stepped(self, step):
            if step.number == 3:
                os.kill(os.getpid(), number)

    options: dict[str, Any] = settings("accumulation") | {"save_steps": None}
    handlers = [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)]
    stopped = make_trainer(tmp_path / "a", listeners=(Ask(),), **options)
    with pytest.raises(Interrupted) as caught:
        stopped.train()
    assert caught.value.exit_code == code
    # The step that was running already when it came is the last one.
    path = tmp_path / "a" / "checkpoints" / "step-00000004"
    assert str(caught.value) == (
        f"stopped after step 4 of 6; the same command goes on from {path}"
    )
    assert path.is_dir()
    assert [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)] == handlers
    stopped.train()  # here, or in another process:
    other = make_trainer(tmp_path / "b", **options)
    other.train()
    assert weights(stopped) == weights(other)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert f"{number.name}: finishing this step and saving" in caplog.text


TWICE = """\
import os, signal, sys, time
from engine.training.signals import Stop, finishing_steps
number = int(sys.argv[1])
with finishing_steps(Stop()):
    os.kill(os.getpid(), number)
    print("once", flush=True)
    os.kill(os.getpid(), number)
    time.sleep(1)
    print("twice", flush=True)
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_second_signal_ends_at_once(tmp_path, number, code):
    done = child(["-c", TWICE, str(int(number))], tmp_path)
    assert (done.returncode, done.stdout) == (code, "once\n")
    assert re.match(f"{number.name}: finishing this step", done.stderr)
