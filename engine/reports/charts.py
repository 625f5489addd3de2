"""Which metrics are drawn together, and how runs and data sets are told apart."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from engine.reports.curves import Chart, Series, thinned
from engine.reports.runs import Points, Run

COLOURS = 8  # of the page's palette


class _Plan(NamedTuple):
    title: str
    unit: str
    metrics: tuple[str, ...]
    limits: tuple[float, float] | None = None
    line: float | None = None


_BOTH = "chosen", "rejected"


def _sides(name: str) -> tuple[str, ...]:
    return tuple(f"{name}/{side}" for side in _BOTH)


_PLANS = (
    _Plan("Loss", "mean over pairs", ("loss",)),
    _Plan("Margin", "reward of chosen - rejected", ("rewards/margins",), None, 0.0),
    _Plan("Accuracy", "pairs ranked right", ("rewards/accuracies",), (0.0, 1.0), 0.5),
    _Plan("Rewards", "beta x log-ratio", _sides("rewards"), None, 0.0),
    _Plan("Log-probabilities", "nats an answer", _sides("logps")),
    _Plan(
        "Log-ratio",
        "policy against reference, nats a token",
        _sides("log_ratio"),
        None,
        0.0,
    ),
    _Plan("Gradient norm", "before clipping", ("grad_norm",)),
    _Plan("Learning rate", "of each update", ("learning_rate",)),
    _Plan("Throughput", "tokens a second", ("perf/tokens_per_second",)),
    _Plan("Step time", "seconds a step", ("perf/step_seconds",)),
    _Plan("Memory", "GiB, the most of a device so far", ("memory/peak_bytes",)),
    _Plan("Entropy", "nats a scored token", ("entropy",)),
    _Plan("Token accuracy", "chosen tokens that are top-1", ("mean_token_accuracy",)),
    _Plan("Mean logits", "of scored tokens", _sides("logits")),
)


def charts(runs: Sequence[Run]) -> Iterator[Chart]:
    """Those of which a run has a value."""
    for plan in _PLANS:
        series = [s for i, run in enumerate(runs) for s in _series(plan, run, i, runs)]
        if series:
            yield Chart(
                title=plan.title,
                unit=plan.unit,
                series=series,
                limits=plan.limits,
                line=plan.line,
            )


def _scaled(points: Points, plan: _Plan) -> Points:
    """In the plan's unit: bytes are told in GiB."""
    if not plan.unit.startswith("GiB"):
        return points
    return [(x, None if y is None else y / 2**30) for x, y in points]


def set_name(prefix: str) -> str:
    """What a set of pairs is called, by its metrics' prefix."""
    return prefix.rstrip("_").replace("_", " ") or "train"


def _series(plan: _Plan, run: Run, place: int, runs: Sequence[Run]) -> Iterator[Series]:
    prefixes = run.prefixes
    for i, prefix in enumerate(prefixes):
        for j, metric in enumerate(plan.metrics):
            points = run.points(prefix + metric)
            if not any(value is not None for _, value in points):
                continue
            several = len(plan.metrics) > 1
            side = metric.rpartition("/")[2] if several else ""
            alone = len(runs) == 1
            words = "" if alone else run.name, side, set_name(prefix)
            label = " ".join(word for word in words if word)
            # Alone, colours tell sides or sets apart; else they tell runs apart.
            colour = place if not alone else (j if several else i)
            yield Series(
                label=label,
                colour=colour % COLOURS,
                points=thinned(_scaled(points, plan)),
                marked=bool(prefix),
                dashed=not alone and j > 0,
            )
