"""How far a run is: what of it goes into a checkpoint beside its arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.training.best import Best
from engine.training.metrics import means
from engine.training.step import StepOut


@dataclass(kw_only=True)
class MetricsWindow:
    """The steps since the last line of metrics; a line averages over them, as TRL does.

    The gradient's norm and whatever is not averaged are the last step's.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    # Those whose update was left out, which have a line to themselves, or none.
    skipped: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    scored: int = 0

    @property
    def num_steps(self) -> int:
        """How many steps there are."""
        return len(self.steps) + len(self.skipped)

    @property
    def tokens_per_second(self) -> float:
        """Unpadded tokens, of the steps so far."""
        return self.tokens / max(self.seconds, 1e-9)

    def add(
        self, out: StepOut, seconds: float, tokens: int, scored: int
    ) -> dict[str, float]:
        """One step, its duration, its unpadded and its scored tokens; its metrics."""
        steps = self.steps if out.applied else self.skipped
        steps.append(means(out.sums))
        self.seconds += seconds
        self.tokens += tokens
        self.scored += scored
        return steps[-1]

    def close(self) -> dict[str, float]:
        """The line's metrics; the window is empty again."""
        steps = self.steps or self.skipped
        line = {n: float(np.mean([step[n] for step in steps])) for n in steps[0]}
        line |= {
            "perf/step_seconds": self.seconds / self.num_steps,
            "perf/tokens_per_second": self.tokens_per_second,
            "perf/scored_fraction": self.scored / max(self.tokens, 1),
        }
        self.__init__()
        return line


@dataclass(kw_only=True)
class Progress:
    """How far a run is; the epoch and the place in it follow from the step.

    It goes with the state: it counts the steps that the state has been through.
    """

    step: int = 0  # optimizer steps done
    tokens: int = 0  # unpadded tokens that went through the policy
    skipped: int = 0  # steps whose update was left out
    window: MetricsWindow = field(default_factory=MetricsWindow)
    latest: dict[str, float] = field(default_factory=dict)  # metrics, by name
    best: Best = field(default_factory=Best)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Become what `dataclasses.asdict` made of another."""
        parts = {
            "window": MetricsWindow(**saved["window"]),
            "best": Best(**saved.get("best", {})),
        }
        self.__init__(**{**saved, **parts})
