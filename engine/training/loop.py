"""The loop: dispatch a step, read the one before, tell listeners, evaluate."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from engine.config.dpo import DPOConfig
from engine.data.batches import prefetch
from engine.data.stream_plans import Plan
from engine.parallel.batch import Batch, put_batch
from engine.training.evaluation import NotFinite
from engine.training.events import Listener, Record, Step
from engine.training.metrics import means
from engine.training.step import StepOut


@dataclass(kw_only=True)
class Progress:
    """How far a run is; the epoch and the place in it follow from the step.

    It goes with the state: it counts the steps that the state has been through.
    """

    step: int = 0  # optimizer steps done
    tokens: int = 0  # unpadded tokens that went through the policy


class _Pending(NamedTuple):
    """A step that was dispatched, and is not read yet."""

    step: int
    tokens: int  # its own
    scored: int  # of these tokens
    tokens_so_far: int
    out: StepOut


class MetricsWindow:
    """The steps since the last line of metrics; a line averages over them, as TRL does.

    The gradient's norm and whatever is not averaged are the last step's.
    """

    def __init__(self):
        """Starts empty."""
        self._clear()

    def _clear(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.seconds = self.tokens = self.scored = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Unpadded tokens, of the steps so far."""
        return self.tokens / max(self.seconds, 1e-9)

    def add(
        self, out: StepOut, seconds: float, tokens: int, scored: int
    ) -> dict[str, float]:
        """One step, its duration, its unpadded and its scored tokens; its metrics."""
        self.steps.append(means(out.sums))
        self.seconds += seconds
        self.tokens += tokens
        self.scored += scored
        return self.steps[-1]

    def close(self) -> dict[str, float]:
        """The line's metrics; the window is empty again."""
        names = self.steps[0]
        line = {n: float(np.mean([step[n] for step in self.steps])) for n in names}
        line |= {
            "perf/step_seconds": self.seconds / len(self.steps),
            "perf/tokens_per_second": self.tokens_per_second,
            "perf/scored_fraction": self.scored / max(self.tokens, 1),
        }
        self._clear()
        return line


class Loop:
    """Runs optimizer steps from where `progress` stands to the end of the plan.

    Args:
        dispatch: starts the next step on a batch, without waiting for it.
        evaluations: for each evaluation set, by the prefix of its metrics' names, what
            computes them; in turn, every `eval_steps` and at the end.
        progress: kept up to date, step by step.
    """

    def __init__(
        self,
        arguments: DPOConfig,
        plan: Plan,
        mesh: Mesh,
        *,
        dispatch: Callable[[Batch, int], StepOut],
        evaluations: Mapping[str, Callable[[], Mapping[str, float]]],
        listener: Listener,
        progress: Progress,
    ):
        self._arguments = arguments
        self._plan = plan
        self._mesh = mesh
        self._dispatch = dispatch
        self._evaluations = evaluations
        self._listener = listener
        self._progress = progress
        self.latest: dict[str, float] = {}

    def run(self) -> None:
        """Every step that is left.

        Raises:
            NotFinite: something is no longer a finite number.
        """
        self._window, self._clock = MetricsWindow(), time.perf_counter()
        first = self._progress.step
        with contextlib.closing(prefetch(self._plan.batches(first))) as batches:
            pending: _Pending | None = None
            for step, (batch, tokens) in enumerate(batches, start=first + 1):
                out = self._dispatch(put_batch(batch, self._mesh), step)
                self._progress.step = step
                self._progress.tokens += tokens
                # Read only now, while the new step runs: the log never waits for it.
                if pending is not None:
                    self._finish(pending)
                scored = int(batch.scored.counts.sum())
                pending = _Pending(step, tokens, scored, self._progress.tokens, out)
                if self._is_due(step):
                    self._finish(pending)
                    if step == self._plan.steps and self._window.steps:
                        self._write(pending)
                    pending = None
                    self._evaluate(step)
                    self._clock = time.perf_counter()

    def _is_due(self, step: int) -> bool:
        """Whether an evaluation, or the end, comes after this step."""
        every = self._arguments.eval_steps
        due = every is not None and step % every == 0
        return step == self._plan.steps or (due and bool(self._evaluations))

    def _finish(self, done: _Pending) -> None:
        """Wait for a step, tell of it, and write its line if it is time."""
        done = done._replace(out=jax.device_get(done.out))
        now = time.perf_counter()
        seconds = now - self._clock
        metrics = self._window.add(done.out, seconds, done.tokens, done.scored)
        self._clock = now
        rate = self._window.tokens_per_second
        self._listener.stepped(
            Step(number=done.step, metrics=metrics, tokens_per_second=rate)
        )
        if not done.out.finite:
            self._write(done)
            raise NotFinite(
                f"step {done.step}: {_what_is_not_finite(metrics, done)}; the model is "
                f"not saved, the metrics are in {self._arguments.save_directory}"
            )
        if done.step % self._arguments.log_steps == 0:
            self._write(done)

    def _write(self, done: _Pending) -> None:
        line = self._place(done.step) | {
            "learning_rate": float(done.out.learning_rate),
            "num_tokens": done.tokens_so_far,
            "grad_norm": float(done.out.grad_norm),
        }
        self._tell("train", "", done.step, line | self._window.close())

    def _evaluate(self, step: int) -> None:
        for prefix, compute in self._evaluations.items():
            line = self._place(step) | dict(compute())
            self._tell("eval", prefix, step, line)

    def _place(self, step: int) -> dict[str, float]:
        size = self._arguments.microbatch_size
        return {"step": step, "epoch": self._plan.epochs_done(step, size)}

    def _tell(
        self, kind: Literal["train", "eval"], prefix: str, step: int, line: dict
    ) -> None:
        self.latest |= line
        record = Record(kind=kind, prefix=prefix, step=step, metrics=line)
        self._listener.recorded(record)


def _what_is_not_finite(metrics: Mapping[str, float], done: _Pending) -> str:
    """What is no number after a step, and what to do about it."""
    loss, norm = metrics["loss"], float(done.out.grad_norm)
    if not math.isfinite(loss) and done.step == 1:
        return (
            f"the loss is {loss} before any update: weights of the model, or of the "
            "reference, are not finite, or overflow; get the checkpoint anew, or try "
            "model.dtype float32"
        )
    what = "this update has made parameters of no finite norm"
    if not math.isfinite(norm):
        what = f"the gradient's norm is {norm}"
    if not math.isfinite(loss):
        what = f"the loss is {loss}"
    return f"{what}; lower learning_rate, or look at the data"
