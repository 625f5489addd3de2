"""The loop: dispatch a step, read the one before, tell listeners, evaluate."""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from engine.config.dpo import DPOConfig
from engine.data.batches import prefetch
from engine.data.stream_plans import Plan
from engine.errors import Interrupted
from engine.parallel.batch import Batch, put_batch
from engine.training.best import BestModel
from engine.training.evaluation import NotFinite, what_is_not_finite
from engine.training.events import Generation, Listener, Record, Step
from engine.training.memory import memory_metrics
from engine.training.progress import MetricsWindow, Progress
from engine.training.step import StepOut


class _Pending(NamedTuple):
    """A step that was dispatched, and is not read yet."""

    step: int
    tokens: int  # its own
    scored: int  # of these tokens
    tokens_so_far: int
    out: StepOut


logger = logging.getLogger(__name__)


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
        check_first: is given what the first step of all tells.
        rows: which rows of the data a step's pairs are, in words.
        saving: asked after every step, when its evaluation is written.
        best: how evaluations are compared, and when the run stops for that.
        generate: what is written to held-out prompts now, asked at each evaluation.
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
        check_first: Callable[[StepOut], None] | None,
        rows: Callable[[int], str],
        saving: Saving,
        best: BestModel | None = None,
        generate: Callable[[], Sequence[Generation]] | None = None,
    ):
        self._arguments = arguments
        self._plan = plan
        self._mesh = mesh
        self._dispatch = dispatch
        self._evaluations = evaluations
        self._listener = listener
        self._progress = progress
        self._check_first = check_first
        self._rows = rows
        self._saving = saving
        self._best = best
        self._generate = generate

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
        if not first and self._arguments.eval_on_start:
            self._evaluate(0)
            self._clock = time.perf_counter()
        if self._is_over():  # it was, when it was saved
            return
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
                evaluates = self._evaluates(step)
                if evaluates:
                    self._finish(pending)
                    if step == self._plan.steps and self._window.num_steps:
                        self._write(pending)
                    self._evaluate(step)
                    if self._is_over() and self._window.num_steps:
                        self._write(pending)
                saves = self._saving.is_due(step)
                if saves:
                    if not evaluates:
                        self._finish(pending)
                    self._saving.save()
                if evaluates or saves:
                    pending, self._clock = None, time.perf_counter()
                if self._is_over():
                    return

    def _is_over(self) -> bool:
        """Whether the run stops before its plan ends."""
        return self._best is not None and self._best.is_over(self._progress.best)

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
        if not (done.out.finite and done.out.applied):
            self._cannot_use(done, metrics)
        elif done.step == 1 and self._check_first is not None:
            self._check_first(done.out)
        if done.step % self._arguments.log_steps == 0:
            self._write(done)

    def _cannot_use(self, done: _Pending, metrics: Mapping[str, float]) -> None:
        """A step with something that is not finite: go on without it, or end."""
        what = f"step {done.step}: {what_is_not_finite(metrics, done.out, done.step)}"
        what += f" (its pairs: {self._rows(done.step)})"
        if done.out.finite:
            self._progress.skipped += 1
            most = self._arguments.max_skipped_steps
            if self._progress.skipped <= most:
                logger.warning("%s; this update is left out", what)
                return
            what += f"; {most} updates were left out before, as max_skipped_steps says"
        self._write(done)
        raise NotFinite(
            f"{what}; the model is not saved, the metrics are in "
            f"{self._arguments.save_directory}"
        )

    def _write(self, done: _Pending) -> None:
        line = self._place(done.step) | {
            "learning_rate": float(done.out.learning_rate),
            "num_tokens": done.tokens_so_far,
            "grad_norm": float(done.out.grad_norm),
        }
        if self._arguments.on_nonfinite == "skip":
            line["skipped_steps"] = self._progress.skipped
        line |= self._window.close() | memory_metrics(self._mesh)
        self._tell("train", "", done.step, line)

    def _evaluate(self, step: int) -> None:
        for prefix, compute in self._evaluations.items():
            line = self._place(step) | dict(compute())
            self._tell("eval", prefix, step, line)
        if self._generate is not None:
            self._listener.generated(step, self._generate())
        if self._best is not None and step:
            self._best.hear(self._progress.best, step, self._progress.latest)
            if self._is_over():
                why = self._best.why_over(self._progress.best)
                logger.info("step %d: %s; training ends here", step, why)

    def _place(self, step: int) -> dict[str, float]:
        size = self._arguments.microbatch_size
        return {"step": step, "epoch": self._plan.epochs_done(step, size)}

    def _tell(
        self, kind: Literal["train", "eval"], prefix: str, step: int, line: dict
    ) -> None:
        self._progress.latest |= line
        record = Record(kind=kind, prefix=prefix, step=step, metrics=line)
        self._listener.recorded(record)
