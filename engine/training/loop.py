"""The loop: dispatch a step, read the one before, tell listeners, evaluate."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from engine.config.dpo import DPOConfig
from engine.data.batches import prefetch
from engine.data.stream_plans import Plan
from engine.errors import Interrupted
from engine.parallel.batch import Batch, put_batch
from engine.training.evaluation import NotFinite
from engine.training.events import Listener, Record, Step
from engine.training.progress import MetricsWindow, Progress
from engine.training.step import StepOut


class _Pending(NamedTuple):
    """A step that was dispatched, and is not read yet."""

    step: int
    tokens: int  # its own
    scored: int  # of these tokens
    tokens_so_far: int
    out: StepOut


@runtime_checkable
class Saving(Protocol):
    """When and how the run is saved."""

    def is_due(self, step: int) -> bool:
        """Whether to save after this step."""
        ...

    def save(self) -> None:
        """Save the run as it is now."""
        ...


class Loop:
    """Runs optimizer steps from where `progress` stands to the end of the plan.

    Args:
        dispatch: starts the next step on a batch, without waiting for it.
        evaluations: for each evaluation set, by the prefix of its metrics' names, what
            computes them; in turn, every `eval_steps` and at the end.
        progress: kept up to date, step by step.
        saving: asked after every step, when its line of metrics is written.
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
        saving: Saving,
    ):
        self._arguments = arguments
        self._plan = plan
        self._mesh = mesh
        self._dispatch = dispatch
        self._evaluations = evaluations
        self._listener = listener
        self._progress = progress
        self._saving = saving

    def run(self) -> None:
        """Every step that is left.

        Raises:
            NotFinite: something is no longer a finite number.
        """
        self._clock, self._window = time.perf_counter(), self._progress.window
        try:
            self._steps(self._progress.step)
        except Interrupted:
            raise
        except BaseException:
            # Steps that were not read are in no line of metrics: begin a new one.
            self._progress.window = MetricsWindow()
            raise

    def _steps(self, first: int) -> None:
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
                evaluates, saves = self._evaluates(step), self._saving.is_due(step)
                if evaluates or saves:
                    self._finish(pending)
                    if step == self._plan.steps and self._window.steps:
                        self._write(pending)
                    pending = None
                    if evaluates:
                        self._evaluate(step)
                    if saves:
                        self._saving.save()
                    self._clock = time.perf_counter()

    def _evaluates(self, step: int) -> bool:
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
        self._progress.latest |= line
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
