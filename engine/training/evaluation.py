"""Metrics over whole data sets."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Mapping

import jax
from jax.sharding import Mesh

from engine.data.batches import BatchPlan, prefetch
from engine.errors import InputError
from engine.parallel.batch import Batch, put_batch
from engine.training.metrics import Sums, means
from engine.training.step import StepOut

_AHEAD = 2  # batches that the device is given before the first one's sums are fetched


def evaluate(
    score: Callable[[Batch], Sums], plan: BatchPlan, mesh: Mesh
) -> dict[str, float]:
    """The means over every pair of a plan, and `perf/seconds`."""
    began = time.perf_counter()
    totals: Sums | None = None
    waiting: deque[Sums] = deque()

    def fetch() -> None:
        nonlocal totals
        sums = jax.tree.map(float, jax.device_get(waiting.popleft()))
        totals = sums if totals is None else add_sums(totals, sums)

    with contextlib.closing(prefetch(plan.batches())) as batches:
        for batch, _ in batches:
            waiting.append(score(put_batch(batch, mesh)))
            if len(waiting) > _AHEAD:
                fetch()
    while waiting:
        fetch()
    assert totals is not None
    return means(totals) | {"perf/seconds": time.perf_counter() - began}


def add_sums(one: Sums, other: Sums) -> Sums:
    """The sums of two sets of pairs together."""
    return jax.tree.map(lambda a, b: a + b, one, other)


class NotFinite(InputError):
    """The model is no longer usable."""

    exit_code = 3


def check_finite(metrics: Mapping[str, float], prefix: str, step: int) -> None:
    """Refuse an evaluation whose loss is no number.

    Raises:
        NotFinite: naming the step and what to do.
    """
    loss = metrics[f"{prefix}loss"]
    if not math.isfinite(loss):
        raise NotFinite(
            f"step {step}: {prefix}loss is {loss}: the model is no longer usable and "
            "is not saved; lower learning_rate, or look at the data"
        )


def what_is_not_finite(metrics: Mapping[str, float], out: StepOut, step: int) -> str:
    """What is no number after a step, and what to do about it."""
    loss, norm = metrics["loss"], float(out.grad_norm)
    if not math.isfinite(loss):
        first = _first_not_finite(metrics)
        if step == 1:
            return (
                f"the loss is {loss} before any update, and {first}: weights of the "
                "model, or of the reference, are not finite, or overflow; get the "
                "checkpoint anew, or try model.dtype float32"
            )
        what = f"the loss is {loss}, and {first}"
    elif not math.isfinite(norm):
        what = f"the gradient's norm is {norm}, and the loss is finite"
    else:
        what = "this update has made parameters of no finite norm"
    return f"{what}; lower learning_rate, or look at the data"


def _first_not_finite(metrics: Mapping[str, float]) -> str:
    """In the order in which they are computed."""
    for name, what in (
        ("logps/chosen", "so is the policy's log-probability of the chosen"),
        ("logps/rejected", "so is the policy's log-probability of the rejected"),
        ("log_ratio/chosen", "so is the reference's log-probability of the chosen"),
        ("log_ratio/rejected", "so is the reference's log-probability of the rejected"),
    ):
        if not math.isfinite(metrics[name]):
            return f"{what} ({name} is the first that is not finite)"
    return "the log-probabilities that it is made of are finite"
