"""The warning about chosen answers that become less likely."""

import logging

import pytest

from engine.training.events import Record
from engine.training.watch import FallingChosen


def told(caplog, lines, prefix="", total=100, every=10) -> list[str]:
    """What is warned of after lines of (log_ratio/chosen, rewards/margins)."""
    listener = FallingChosen()
    listener.started(total, 0)
    with caplog.at_level(logging.WARNING):
        for i, (ratio, margin) in enumerate(lines, start=1):
            metrics = {
                f"{prefix}log_ratio/chosen": ratio,
                f"{prefix}rewards/margins": margin,
            }
            kind = "eval" if prefix else "train"
            listener.recorded(
                Record(kind=kind, prefix=prefix, step=i * every, metrics=metrics)
            )
    return [record.message for record in caplog.records]


FALLING = [(0.0, 0.1), (-0.1, 0.2), (-0.1, 0.4), (-0.2, 0.9), (-0.3, 1.5)]


@pytest.mark.parametrize("prefix", ["", "eval_"])
def test_a_fall_is_told_once(prefix, caplog):
    (line,) = told(caplog, FALLING, prefix)
    assert line.startswith(f"{prefix}log_ratio/chosen is -0.20: for 20 steps")
    assert "from 0.20 to 0.90" in line and "rpo_alpha" in line


@pytest.mark.parametrize(
    "lines, total",
    [
        ([(ratio + 0.3, margin) for ratio, margin in FALLING], 100),  # above
        ([(ratio, 1 - margin) for ratio, margin in FALLING], 100),  # the margin falls
        (FALLING[:3], 100),  # not for long
        (FALLING, 1000),  # not for long in a long run
        ([FALLING[2], (0.0, 1.0)] * 5, 100),  # now and then
    ],
)
def test_what_is_no_fall(lines, total, caplog):
    assert told(caplog, lines, total=total) == []
