"""What a line of metrics says, and that no line is lost."""

import json

import pytest

from engine.training.metrics import MetricsFile, Window, means
from engine.training.step import SUMS


def sums(**changes) -> dict[str, float]:
    given = dict.fromkeys((*SUMS, "grad_norm"), 0.0)
    return given | {"pairs": 2.0, "scored": 1.0} | changes


def test_means_are_over_pairs_or_over_scored_tokens():
    found = means(
        sums(
            loss=3.0,
            chosen_rewards=1.0,
            rejected_rewards=-1.0,
            entropy=10.0,
            scored=5.0,
            scored_chosen=4.0,
            top1_chosen=1.0,
            logits_chosen=8.0,
        )
    )
    assert found["loss"] == 1.5
    assert found["rewards/margins"] == 1.0
    assert found["entropy"] == 2.0
    assert found["mean_token_accuracy"] == 0.25
    assert found["logits/chosen"] == 2.0
    assert found["logits/rejected"] == 0.0  # no such token: not NaN


def test_a_line_averages_the_steps_since_the_last_one():
    window = Window()
    window.add(sums(loss=2.0, grad_norm=5.0), seconds=1.0, tokens=30)
    window.add(sums(loss=6.0, grad_norm=7.0), seconds=3.0, tokens=10)
    line = window.close()
    assert line["loss"] == 2.0
    assert line["grad_norm"] == 7.0  # the last step's
    assert line["perf/step_seconds"] == 2.0
    assert line["perf/tokens_per_second"] == 10.0
    assert line["perf/scored_fraction"] == pytest.approx(2 / 40)
    assert not window.steps


def test_an_earlier_run_is_kept(tmp_path):
    for run in range(3):
        MetricsFile(tmp_path).write({"run": run})
    names = ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")
    found = [json.loads((tmp_path / name).read_text())["run"] for name in names]
    assert found == [0, 1, 2]


def test_full_precision_and_valid_json(tmp_path):
    file = MetricsFile(tmp_path)
    file.write({"loss": 0.1234567890123456, "grad_norm": float("nan")})
    line = file.path.read_text()
    assert "0.1234567890123456" in line
    assert json.loads(line)["grad_norm"] is None
