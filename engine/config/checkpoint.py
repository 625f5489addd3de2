"""Options of checkpoints and of what ends a run early: part of `trainer:`."""

from dataclasses import dataclass
from typing import Literal

from engine.config.fields import (
    check_count,
    check_positive,
    check_unused,
    check_within,
)

_MOST_MINUTES = 2**20  # two years


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Options of checkpoints, which are in `save_directory`/checkpoints.

    A run that saves at all saves its last step too.
    """

    save_steps: int | None = None  # optimizer steps between two checkpoints
    save_interval_minutes: float | None = 30.0  # between two; None: by steps alone
    # The newest that are kept, and the best by metric_for_best_model, if that is given,
    # for one of them; None: every one.
    save_total_limit: int | None = 2
    # Go on from the newest checkpoint. False: begin anew, in an empty directory.
    resume: bool = True

    # Where the loss or the gradient of a step is not finite: end the run, or leave that
    # update out and go on.
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped_steps: int = 10  # of a run; one more ends it

    def _check_checkpoints(self) -> None:
        check_count(self, "save_steps", "save_total_limit", "max_skipped_steps")
        if self.on_nonfinite == "stop":
            check_unused(self, "without on_nonfinite='skip'", "max_skipped_steps")
        check_positive(self, "save_interval_minutes")
        check_within(self, 0, _MOST_MINUTES, "save_interval_minutes")
