"""What the kernels are meant to reach on an H100 or H200."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A bound on one number of a row."""

    text: str
    least: float | None = None
    most: float | None = None

    def met(self, value: float) -> bool:
        """Whether the number is within the bound."""
        low = self.least is None or value >= self.least
        return low and (self.most is None or value <= self.most)


FORWARD_GOALS = {
    "mosaic_gpu": Goal(text="forward >= 0.92 R", least=92),
    "triton": Goal(text="forward >= 0.80 R", least=80),
}
GRADIENT_GOAL = Goal(text="forward and gradient at 8TDV >= 0.88 R", least=88)
SMALL_GOAL = Goal(text="forward and gradient of few rows >= 0.75 R", least=75)
KEEPING_GOAL = Goal(text="forward and gradient, 1 GiB <= 17.3 ms", most=17.3)
PADDED_GOAL = Goal(text="half the rows padded <= 0.55 of the time", most=0.55)
