"""Options of checkpoints and of what ends a run early: part of `trainer:`."""

from dataclasses import dataclass

from engine.config.fields import check_count, check_positive, check_within

_MOST_MINUTES = 2**20  # two years


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Options of checkpoints, which are in `save_directory`/checkpoints.

    A run that saves at all saves its last step too.
    """

    save_steps: int | None = None  # optimizer steps between two checkpoints
    save_interval_minutes: float | None = 30.0  # between two; None: by steps alone
    save_total_limit: int | None = 2  # the newest that are kept; None: every one
    # Go on from the newest checkpoint. False: begin anew, in an empty directory.
    resume: bool = True

    def _check_checkpoints(self) -> None:
        check_count(self, "save_steps", "save_total_limit")
        check_positive(self, "save_interval_minutes")
        check_within(self, 0, _MOST_MINUTES, "save_interval_minutes")
