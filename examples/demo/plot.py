"""The demo's curves, from the run's `metrics.jsonl` to a PNG."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

TRAIN_COLOUR, HELD_OUT_COLOUR = "#4c72b0", "#c44e52"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """One dict a line, in the order of the steps."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curve(rows: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of the metric `name`, where it was logged."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def draw_pair(axes: Axes, rows: list[dict[str, float]], name: str, title: str) -> None:
    """The training curve thin, the held-out one thick."""
    axes.plot(*curve(rows, name), color=TRAIN_COLOUR, alpha=0.7, label="training")
    held_out = curve(rows, f"eval_{name}")
    axes.plot(*held_out, "o-", color=HELD_OUT_COLOUR, lw=2, ms=3, label="held-out")
    axes.set(title=title, xlabel="optimizer step")
    axes.grid(alpha=0.3)


def plot_curves(rows: list[dict[str, float]], path: Path, goal: float) -> None:
    """Loss, reward margin and accuracy against the step, as a PNG at `path`."""
    figure, (loss, margins, accuracy) = plt.subplots(1, 3, figsize=(13, 4))
    draw_pair(loss, rows, "loss", "DPO loss")
    draw_pair(margins, rows, "rewards/margins", "reward margin, chosen - rejected")
    draw_pair(accuracy, rows, "rewards/accuracies", "share of pairs ranked right")
    accuracy.set_ylim(0, 1.02)
    accuracy.axhline(0.5, color="grey", ls=":", label="chance")
    accuracy.axhline(goal, color="black", ls="--", lw=1, label=f"goal: {goal}")
    accuracy.legend(loc="lower right")
    loss.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
