"""When a run is saved, what of it, and how it goes on from there."""

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from engine import __version__
from engine.config.dpo import DPOConfig
from engine.errors import InputError, Interrupted, stage
from engine.parallel import processes
from engine.parallel.agreement import Agreement, Asked
from engine.paths import as_path
from engine.training.best import BestModel
from engine.training.checkpoints import Store
from engine.training.continuation import (
    check_empty,
    check_not_over,
    check_not_stopped,
    of_another_run,
)
from engine.training.identity import check_same_run
from engine.training.listeners import MetricsFile
from engine.training.progress import Progress
from engine.training.signals import Stop

logger = logging.getLogger(__name__)


class Identity(NamedTuple):
    """What a run has to have in common with the one that it goes on with."""

    config: Mapping[str, Any]  # by dotted keys
    weights: str  # a checksum of those that never change


class Checkpointing:
    """A run's checkpoints.

    Args:
        arrays: all that changes, as it is now.
        identity: of this run. It is asked once, if at all.
        best: how evaluations are compared; the best one's step is saved.
    """

    def __init__(
        self,
        arguments: DPOConfig,
        total_steps: int,
        metrics: MetricsFile,
        *,
        progress: Progress,
        arrays: Callable[[], Any],
        identity: Callable[[], Identity],
        best: BestModel | None = None,
    ):
        self._arguments = arguments
        self._total_steps = total_steps
        self._metrics = metrics
        self._progress = progress
        self._arrays = arrays
        self._make_identity = identity
        self._identity: Identity | None = None
        self._directory = as_path(arguments.save_directory)
        self._best = best
        self._store = Store(
            self._directory, arguments.save_total_limit, is_best=_was_best
        )
        self._saves = arguments.save_steps is not None
        self._saved_at = time.monotonic()
        self._agree: Agreement | None = None
        self._asked = Asked()
        self.stop = Stop()

    @property
    def identity(self) -> Identity:
        """Of this run."""
        if self._identity is None:
            self._identity = self._make_identity()
        return self._identity

    def restore(self, abstract: Any) -> Any | None:
        """The arrays of the newest good checkpoint, or None where there is none.

        `progress` and the file of metrics are as they were when it was saved.

        Raises:
            InputError: it is another run's, or this run is over; or there are
                checkpoints, and none is good.
        """
        found = processes.first_decides(self._look)
        if found is None:
            return None
        step, damaged, finished, facts = found
        where = of_another_run(self._store, step)
        then, now = Identity(**facts["identity"]), self.identity
        # As JSON has it: what is compared has been there.
        config = json.loads(json.dumps(now.config))
        for change in check_same_run(then.config, config, self._arguments, where):
            logger.info("going on with another configuration: %s", change)
        if then.weights != now.weights:
            raise InputError(
                f"{where}: the weights that are not trained, or the reference's, are "
                f"not those that it began with (checksum {then.weights}, and now "
                f"{now.weights}); bring them back, or give another save_directory"
            )
        check_not_over(self._store, step, self._total_steps, finished)
        check_not_stopped(self._store, step, self._best, facts, finished)
        if processes.is_first():
            for bad in damaged:
                self._store.set_aside(bad)
            self._metrics.cut(facts["metrics_bytes"])
        found = self._load(step, abstract)
        self._progress.restore(facts["progress"])
        self._saves = True
        logger.info("going on from the checkpoint of step %d", step)
        return found

    def _look(self) -> tuple[int, list[int], int, Any] | None:
        """The newest good checkpoint's step, damaged ones, where it ended, and facts.

        Raises:
            InputError: there are some, and none is good; or any, and they are not to be
                used.
        """
        if not self._arguments.resume:
            check_empty(self._directory)
            return None
        step, damaged = self._store.newest()
        if step is None:
            return None
        return step, damaged, self._store.finished() or 0, self._store.facts(step)

    def begin(self, mesh: Mesh) -> None:
        """Before the first step: all processes save at the same ones.

        Raises:
            InputError: they write to different disks.
        """
        if processes.count() > 1:
            self._check_shared()
            self._agree = Agreement(mesh)

    def _check_shared(self) -> None:
        path = self._directory / f".seen-by-all-{os.getpid()}"

        def write() -> str:
            with stage(f"{path} cannot be written", "see save_directory"):
                self._directory.mkdir(parents=True, exist_ok=True)
                path.touch()
            return path.name

        name = processes.first_decides(write)
        seen = processes.gather((self._directory / name).exists())
        if processes.is_first():
            path.unlink()
        if not all(seen):
            raise InputError(
                f"save_directory={str(self._directory)!r}: process "
                f"{seen.index(False)} does not see there what process 0 writes; give a "
                "directory that all processes share"
            )

    def is_due(self, step: int) -> bool:
        """Whether to save after this step."""
        every, minutes = (
            self._arguments.save_steps,
            self._arguments.save_interval_minutes,
        )
        since, best = time.monotonic() - self._saved_at, self._progress.best
        late = minutes is not None and since >= 60 * minutes and processes.is_first()
        asked = Asked(stop=self.stop.number or 0, save=int(late))
        self._asked = self._agree(asked) if self._agree is not None else asked
        over = self._best is not None and self._best.is_over(best)
        return bool(
            self._asked.stop
            or self._asked.save
            or (self._best is not None and best.step == step)
            or (every is not None and step % every == 0)
            or ((over or step == self._total_steps) and self._saves)
        )

    def save(self) -> None:
        """Begin to write what the run is now.

        Raises:
            Interrupted: a signal asked for it; then all is written.
        """
        step = self._progress.step
        facts = {
            "version": __version__,
            "identity": self.identity._asdict(),
            "progress": dataclasses.asdict(self._progress),
            "metrics_bytes": self._metrics.size() if processes.is_first() else 0,
        }
        arrays = _named(self._arrays())
        self._store.save(step, arrays, facts)
        self._saves, self._saved_at = True, time.monotonic()
        stop = self._asked.stop
        if self._agree is not None:
            self._agree.forget()
        else:  # it may have come since
            stop = self.stop.number or 0
        if stop:
            raise Interrupted(stop, self._how_to_go_on(step))

    def _how_to_go_on(self, step: int) -> str:
        done = f"stopped after step {step} of {self._total_steps}"
        if self._store.close():
            return f"{done}; the same command goes on from {self._store.path(step)}"
        older = self._store.steps()
        ending = f"from step {older[-1]}" if older else "from the beginning"
        return f"{done}, which could not be saved; the same command goes on {ending}"

    def load_best(self, abstract: Any) -> Any | None:
        """The arrays of the best evaluation, or None where those that are there do.

        They do where they are the best ones, and where those cannot be had.
        """
        assert self._best is not None
        best, last = self._progress.best, self._progress.step
        words = self._best.words(best)
        if best.step in (0, last):
            logger.info("%s: the model is that of the last step, %d", words, last)
            return None
        self._store.close()
        damage = processes.first_decides(lambda: self._store.damage(best.step))
        if damage is not None:
            logger.error(
                "%s, and %s cannot be loaded (%s): the model is that of the last step, "
                "%d",
                words,
                self._store.path(best.step),
                damage,
                last,
            )
            return None
        found = self._load(best.step, abstract)
        logger.info("%s: the model is that one, not the last step's, %d", words, last)
        return found

    def _load(self, step: int, abstract: Any) -> Any:
        named = _named(abstract)
        # First: what was loaded for nothing would lie beside what is loaded now.
        for array in _named(self._arrays()).values():
            array.delete()
        found = self._store.load(step, named)
        return jax.tree.unflatten(
            jax.tree.structure(abstract), [found[name] for name in named]
        )

    def newest(self) -> str:
        """Where a run that fails can be taken up, in words."""
        self._store.close()
        steps = self._store.steps()
        if not steps:
            return "there is no checkpoint"
        return (
            f"the newest checkpoint is {self._store.path(steps[-1])}, from which "
            "on_nonfinite=skip goes on without such updates"
        )

    def finished(self) -> None:
        """The run's model is saved."""
        if self._store.close() and processes.is_first() and self._store.steps():
            self._store.mark_finished(self._progress.step)

    def close(self) -> None:
        """Wait for what is being written."""
        self._store.close()


def _was_best(step: int, facts: Any) -> bool:
    """Whether a checkpoint is that of the best evaluation until then."""
    return facts["progress"].get("best", {}).get("step") == step


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their paths in words."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves
    }
    assert len(named) == len(leaves), "two leaves of one name"
    return named
