"""What a line of metrics says, and that no line is lost."""

import json
import math
from typing import Any

import numpy as np
import pytest

from engine.errors import InputError
from engine.training.events import Record
from engine.training.listeners import MetricsFile
from engine.training.loop import MetricsWindow
from engine.training.metrics import Sums, means
from engine.training.step import StepOut
from tests.json_lines import read_lines


def sums(**pairs) -> Sums:
    """Of two pairs, with five scored tokens, four of them chosen, none rejected."""
    return Sums(
        sums={
            "pairs": pairs,
            "tokens": {"entropy": 10.0},
            "chosen": {"mean_token_accuracy": 1.0, "logits/chosen": 8.0},
            "rejected": {"logits/rejected": 0.0},
        },  # pyright: ignore[reportArgumentType]
        weights={"pairs": 2.0, "tokens": 5.0, "chosen": 4.0, "rejected": 0.0},  # pyright: ignore[reportArgumentType]
    )


def out(loss: float, applied: bool = True) -> StepOut:
    scalars: Any = np.float32(1.0), np.float32(0.0), np.bool_(True), np.bool_(applied)
    return StepOut(sums(loss=loss), *scalars)


def test_means_are_over_pairs_or_over_scored_tokens():
    found = means(sums(loss=3.0))
    assert found["loss"] == 1.5
    assert found["entropy"] == 2.0
    assert found["mean_token_accuracy"] == 0.25
    assert found["logits/chosen"] == 2.0
    assert found["logits/rejected"] == 0.0  # no such token: not NaN


def test_a_line_averages_the_steps_since_the_last_one():
    window = MetricsWindow()
    window.add(out(loss=2.0), seconds=1.0, tokens=30, scored=4)
    assert window.add(out(loss=6.0), seconds=3.0, tokens=10, scored=6)["loss"] == 3.0
    assert window.tokens_per_second == 10.0
    line = window.close()
    assert line["loss"] == 2.0
    assert line["perf/step_seconds"] == 2.0
    assert line["perf/tokens_per_second"] == 10.0
    assert line["perf/scored_fraction"] == pytest.approx(10 / 40)
    assert not window.steps


def test_skipped_steps_are_in_no_average_of_others():
    window = MetricsWindow()
    window.add(out(loss=math.nan, applied=False), seconds=1.0, tokens=10, scored=5)
    window.add(out(loss=4.0), seconds=3.0, tokens=10, scored=5)
    line = window.close()
    assert line["loss"] == 2.0 and line["perf/step_seconds"] == 2.0
    window.add(out(loss=math.nan, applied=False), seconds=1.0, tokens=10, scored=5)
    assert math.isnan(window.close()["loss"])
    assert not window.num_steps


def record(**metrics) -> Record:
    return Record(kind="train", prefix="", step=1, metrics=metrics)


def test_an_earlier_run_is_kept(tmp_path):
    """Under another name; and one that still runs goes on in its own file."""
    files = [MetricsFile(tmp_path) for _ in range(3)]
    for run, file in enumerate(files):
        file.started(1, 0)
        file.recorded(record(run=run))
    for run, file in enumerate(files):
        file.recorded(record(run=run))
        file.ended(None)
    names = ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")
    found = [[x["run"] for x in read_lines(tmp_path / name)] for name in names]
    assert found == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize("kind", ["directory", "link"])
def test_what_is_no_file_of_an_earlier_run_stays(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    if kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere.jsonl")
    with pytest.raises(InputError, match="metrics.jsonl is a link or a directory"):
        MetricsFile(tmp_path).started(1, 0)
    assert path.is_symlink() or path.is_dir()
    assert [other.name for other in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_full_precision_and_valid_json(tmp_path):
    file = MetricsFile(tmp_path)
    file.started(1, 0)
    file.recorded(record(loss=0.1234567890123456, grad_norm=float("nan")))
    line = file.path.read_text()
    file.ended(None)
    assert "0.1234567890123456" in line
    assert json.loads(line)["grad_norm"] is None
