"""Checkpoints on disk: written beside, checked, then renamed; newest good one first.

`DIR/checkpoints/step-00000042/` has `arrays/`, which orbax writes, `run.json`, what the
run knows beside its arrays, and `manifest.json`: size and checksum of every other file.
A directory of that name is whole. While it is written it has another one.

Of several processes all call `save`, `wait`, `close` and `load`, in the same order:
each has its own parts of the arrays, and process 0 does the rest.
"""

import contextlib
import errno
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from engine.errors import InputError, library_errors, one_line, stage
from engine.parallel import processes
from engine.training.manifest import MANIFEST, Damaged, check, manifest
from engine.training.together import together, wait_for

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
FINISHED = "finished.json"
_ARRAYS, _RUN = "arrays", "run.json"
_NAME = re.compile(r"step-(\d{8,})")
_OURS = re.compile(r"\.step-\d{8,}\.(part|old)")  # left by who was killed


class Store:
    """The checkpoints of a save directory.

    Args:
        limit: how many are kept; None: all.
        is_best: of a step and its facts; the newest of which it is true stays.
    """

    def __init__(
        self,
        directory: Path,
        limit: int | None,
        is_best: Callable[[int, Any], bool] = lambda step, facts: False,
    ):
        self.directory = directory.absolute() / FOLDER  # as orbax wants it
        self._limit = limit
        self._is_best = is_best
        self._pool: ThreadPoolExecutor | None = None
        self._writing: tuple[int, Future[None]] | None = None
        self._number = itertools.count()  # of a save

    def path(self, step: int) -> Path:
        """The directory of a step's checkpoint."""
        return self.directory / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """The steps of which there is one, ascending."""
        if not self.directory.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(name[1]) for name in found if name)

    def save(self, step: int, arrays: Mapping[str, jax.Array], facts: Any) -> bool:
        """Begin to write a checkpoint; whether that, and the one before, went well.

        It returns as soon as the arrays may change. What fails is said in one line, and
        leaves the older checkpoints as they are.
        """
        fine = self.wait()
        staging = self.directory / f".step-{step:08d}.part"

        def prepared() -> bool:
            if self.path(step).exists():  # the run came this far before
                return False
            with self._writes(step):
                self._clear()
                staging.mkdir(parents=True)
            return True

        try:
            if not processes.first_decides(prepared):
                return fine
        except InputError as error:
            self._give_up(staging, error)
            return False
        copied: Any
        try:
            with self._writes(step):
                copied = _checkpoint_library().save_async(
                    staging / _ARRAYS, dict(arrays)
                )
        except InputError as error:
            if processes.count() == 1:
                self._give_up(staging, error)
                return False
            copied = error  # which `_finish` tells the others
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        label = f"checkpoint {step}, save {next(self._number)}"
        future = self._pool.submit(self._finish, step, staging, copied, facts, label)
        self._writing = step, future
        return fine

    def _finish(
        self, step: int, staging: Path, copied: Any, facts: Any, label: str
    ) -> None:
        arrays = f"{label}, arrays"
        with together(arrays), self._writes(step):
            if isinstance(copied, InputError):
                raise copied
            wait_for(copied, arrays)
        with together(label):
            if processes.is_first():
                self._seal(step, staging, facts)

    def _seal(self, step: int, staging: Path, facts: Any) -> None:
        """What was written is whole: give it its name."""
        with self._writes(step):
            _write(staging / _RUN, json.dumps(facts))
            _write(staging / MANIFEST, manifest(staging))
            _flush(staging)
            os.rename(staging, self.path(step))
            _flush(self.directory)
        logger.info("saved a checkpoint of step %d in %s", step, self.path(step))
        for old in self._too_many():
            self._remove(old)

    def _too_many(self) -> list[int]:
        """What goes: the oldest, but neither the newest nor the best one."""
        steps = self.steps()
        if self._limit is None or len(steps) <= self._limit:
            return []
        kept = {steps[-1], next(filter(self._looks_best, steps[::-1]), steps[-1])}
        others = [step for step in steps if step not in kept]
        return others[: len(steps) - max(self._limit, len(kept))]

    def _looks_best(self, step: int) -> bool:
        with contextlib.suppress(OSError, ValueError):  # one that is damaged does not
            return self._is_best(step, self.facts(step))
        return False

    def _writes(self, step: int) -> contextlib.AbstractContextManager[None]:
        def explain(error: BaseException) -> str:
            said = one_line(error)
            for code in errno.ENOSPC, errno.EDQUOT:
                if os.strerror(code) in str(error):
                    said = os.strerror(code)  # of all that the library says
            return (
                f"{self.path(step)}: the checkpoint cannot be written: {said}; free "
                "some space, or see save_directory"
            )

        return library_errors(explain)

    def wait(self) -> bool:
        """Until what is being written is on the disk; whether it is."""
        if self._writing is None:
            return True
        (step, future), self._writing = self._writing, None
        try:
            future.result()
        except InputError as error:
            self._give_up(self.directory / f".step-{step:08d}.part", error)
            return False
        return True

    def close(self) -> bool:
        """Wait, and end the thread."""
        fine = self.wait()
        if not fine and processes.is_first():  # what else was being written of it
            self._clear()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        return fine

    def _give_up(self, staging: Path, error: InputError) -> None:
        if not processes.is_first():
            return
        shutil.rmtree(staging, ignore_errors=True)
        older = self.steps()
        kept = f"that of step {older[-1]} is kept" if older else "there is none yet"
        logger.error("%s; %s, and training goes on", error, kept)

    def _remove(self, step: int) -> None:
        # Under another name first: a directory of this name is always whole.
        old = self.directory / f".step-{step:08d}.old"
        with stage(f"{self.path(step)}: an old checkpoint cannot be removed"):
            os.rename(self.path(step), old)
            shutil.rmtree(old)

    def _clear(self) -> None:
        """Remove what a run that was killed left of its work."""
        if self.directory.is_dir():
            for path in self.directory.iterdir():
                if _OURS.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)

    def newest(self, contents: bool = True) -> tuple[int | None, list[int]]:
        """The step of the newest good one, and those of damaged ones after it.

        Args:
            contents: look into the arrays too, which takes as long as loading them.
        Raises:
            InputError: there are some, and none is good.
        """
        damaged: list[tuple[int, str]] = []
        for step in reversed(self.steps()):
            damage = self.damage(step, contents)
            if damage is not None:
                logger.error("%s: %s; it is not used", self.path(step), damage)
                damaged.append((step, damage))
                continue
            if damaged:
                logger.error("going back to the checkpoint of step %d", step)
            return step, [bad for bad, _ in damaged]
        if damaged:
            step, damage = damaged[0]
            raise InputError(
                f"{self.directory} has no checkpoint that is whole (the newest, of step"
                f" {step}: {damage}); nothing there was changed: bring the files back, "
                "or give another save_directory to begin anew"
            )
        return None, []

    def set_aside(self, step: int) -> None:
        """Give a damaged one another name: the run will come to its step again."""
        number, name = 1, f"damaged-{self.path(step).name}"
        while (aside := self.directory / f"{name}.{number}").exists():
            number += 1
        with stage(f"{self.path(step)} cannot be renamed"):
            os.rename(self.path(step), aside)
        logger.error("kept the damaged checkpoint as %s", aside)

    def damage(self, step: int, contents: bool = True) -> str | None:
        """What is not as it was written, naming the file; None: everything is.

        Args:
            contents: look into the arrays, too, and not at their sizes alone.
        """
        try:
            check(self.path(step), None if contents else {_RUN})
        except Damaged as error:
            return str(error)
        return None

    def facts(self, step: int) -> Any:
        """What was saved beside the arrays, of a checkpoint that is whole."""
        return json.loads((self.path(step) / _RUN).read_text(encoding="utf-8"))

    def load(
        self, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """The arrays, with these shapes, dtypes and shardings.

        The vocabulary's rows may be more or fewer than were saved: how many zeros pad
        them is the mesh's matter.
        """
        path = self.path(step)
        with stage(f"{path}: the checkpoint cannot be loaded", "see save_directory"):
            library = _checkpoint_library()
            options = library.options.ArrayOptions
            padding = options.Loading(enable_padding_and_truncation=True)
            with library.Context(array_options=options(loading=padding)):
                return library.load(path / _ARRAYS, dict(abstract))

    def mark_finished(self, step: int) -> None:
        """Note that the run's model has been saved, after so many steps."""
        with stage(f"{self.directory} cannot be written", "see save_directory"):
            part = self.directory / f".{FINISHED}.part"
            _write(part, json.dumps({"step": step}))
            os.replace(part, self.directory / FINISHED)

    def finished(self) -> int | None:
        """After how many steps the run's model was saved."""
        path = self.directory / FINISHED
        if not path.is_file():
            return None
        with stage(f"{path} cannot be read", "remove it to save the model again"):
            return int(json.loads(path.read_text(encoding="utf-8"))["step"])


def _checkpoint_library() -> Any:
    # Imported where it is needed: it takes half a second.
    from orbax.checkpoint import v1

    # Its threads log the traceback of every error that it raises as well.
    logging.getLogger("absl").addFilter(_is_not_orbaxs)
    return v1


def _is_not_orbaxs(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
