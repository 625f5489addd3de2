"""From the step's sums to TRL's metrics, and to one JSON object a line."""

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"

_PAIR_MEANS = {
    "loss": "loss",
    "rewards/chosen": "chosen_rewards",
    "rewards/rejected": "rejected_rewards",
    "rewards/accuracies": "accuracies",
    "logps/chosen": "chosen_logps",
    "logps/rejected": "rejected_logps",
}
_TOKEN_MEANS = {
    "logits/chosen": ("logits_chosen", "scored_chosen"),
    "logits/rejected": ("logits_rejected", "scored_rejected"),
    "entropy": ("entropy", "scored"),
    "mean_token_accuracy": ("top1_chosen", "scored_chosen"),
}


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """TRL's metrics over the pairs, and the scored tokens, that `sums` add up.

    Names and definitions are TRL's; rewards are in nats times beta, logps and entropy
    in nats. A mean over no tokens is 0.
    """
    found = {name: sums[key] / sums["pairs"] for name, key in _PAIR_MEANS.items()}
    found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    for name, (key, count) in _TOKEN_MEANS.items():
        found[name] = sums[key] / sums[count] if sums[count] else 0.0
    return found


class Window:
    """The steps since the last line of metrics; a line averages over them, as TRL does.

    The gradient's norm and whatever is not averaged are the last step's.
    """

    def __init__(self):
        """Starts empty."""
        self._clear()

    def _clear(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.seconds = self.tokens = self.scored = self.last_norm = 0.0

    def add(self, sums: Mapping[str, float], seconds: float, tokens: int) -> None:
        """One optimizer step: its sums, its duration, its unpadded tokens."""
        self.steps.append(means(sums))
        self.last_norm = sums["grad_norm"]
        self.seconds += seconds
        self.tokens += tokens
        self.scored += sums["scored"]

    def close(self) -> dict[str, float]:
        """The line's metrics; the window is empty again."""
        names = self.steps[0]
        line = {n: float(np.mean([step[n] for step in self.steps])) for n in names}
        line |= {
            "grad_norm": self.last_norm,
            "perf/step_seconds": self.seconds / len(self.steps),
            "perf/tokens_per_second": self.tokens / max(self.seconds, 1e-9),
            "perf/scored_fraction": self.scored / max(self.tokens, 1),
        }
        self._clear()
        return line


class MetricsFile:
    """`metrics.jsonl` in the save directory: full precision, one object a line.

    A file that is there already belongs to an earlier run: it is kept under another
    name, `metrics.1.jsonl` and so on.
    """

    def __init__(self, directory: Path):
        """Creates the directory; the file itself with its first line."""
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / FILE_NAME
        if self.path.exists():
            number = 1
            while (old := self.path.with_suffix(f".{number}.jsonl")).exists():
                number += 1
            os.rename(self.path, old)
            logger.info("kept the metrics of an earlier run as %s", old)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line, and flush it: a crash loses nothing that was written."""
        # NaN is no JSON: what is not finite is null.
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in line.items()
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
