"""Metrics over whole data sets."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from engine.data.batches import BatchPlan, prefetch
from engine.errors import InputError
from engine.parallel.batch import Batch, put_batch
from engine.training.intervals import Estimate, ratio, share
from engine.training.metrics import METRICS, PairValues, Sums, means
from engine.training.step import StepOut

_AHEAD = 2  # batches that the device is given before the first one's sums are fetched


def evaluate(
    score: Callable[[Batch], Sums], plan: BatchPlan, mesh: Mesh
) -> dict[str, float]:
    """The means over every pair of a plan, and `perf/seconds`."""
    began = time.perf_counter()
    totals: Sums | None = None
    for found in _scored(score, plan, mesh):
        sums = jax.tree.map(float, found)
        totals = sums if totals is None else add_sums(totals, sums)
    assert totals is not None
    return means(totals) | {"perf/seconds": time.perf_counter() - began}


def estimate(
    score: Callable[[Batch], PairValues], plan: BatchPlan, mesh: Mesh
) -> dict[str, Estimate]:
    """The means over every pair of a plan, each with its confidence interval."""
    found = list(_scored(score, plan, mesh))
    whole = jax.tree.map(lambda *x: np.concatenate(x).astype(np.float64), *found)
    real = whole.weights["pairs"] > 0  # the others pad the batches
    estimates: dict[str, Estimate] = {}
    for over, sums in whole.sums.items():
        weights = whole.weights[over][real]
        for name, values in sums.items():
            of = share if name == "rewards/accuracies" else ratio
            estimates[name] = of(values[real], weights)
    # JAX sorts what it returns by name.
    order = dict.fromkeys((*METRICS, *estimates))
    return {name: estimates[name] for name in order}


def _scored[Scores](
    score: Callable[[Batch], Scores], plan: BatchPlan, mesh: Mesh
) -> Iterator[Scores]:
    """What is made of each batch, on the host, while the device goes on."""
    waiting: deque[Scores] = deque()
    with contextlib.closing(prefetch(plan.batches())) as batches:
        for batch, _ in batches:
            waiting.append(score(put_batch(batch, mesh)))
            if len(waiting) > _AHEAD:
                yield jax.device_get(waiting.popleft())
    while waiting:
        yield jax.device_get(waiting.popleft())


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
