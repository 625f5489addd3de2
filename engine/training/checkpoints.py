"""Checkpoints on disk: written beside, checked, then renamed; newest good one first.

`DIR/checkpoints/step-00000042/` has `arrays/`, which orbax writes, `run.json`, what the
run knows beside its arrays, and `manifest.json`: size and checksum of every other file.
A directory of that name is whole. While it is written it has another one.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from engine.errors import InputError, library_errors, one_line, stage

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
FINISHED = "finished.json"
_ARRAYS, _RUN, _MANIFEST = "arrays", "run.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_OURS = re.compile(r"\.step-\d{8,}\.(part|old)")  # left by who was killed
_BLOCK = 2**22


class Damaged(Exception):
    """A checkpoint that is not what was written, in words."""


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
        if self.path(step).exists():  # the run came this far before
            return fine
        staging = self.directory / f".step-{step:08d}.part"
        try:
            with self._writes(step):
                self._clear()
                staging.mkdir(parents=True)
                copied = _checkpoint_library().save_async(
                    staging / _ARRAYS, dict(arrays)
                )
        except InputError as error:
            self._give_up(staging, error)
            return False
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        future = self._pool.submit(self._finish, step, staging, copied, facts)
        self._writing = step, future
        return fine

    def _finish(self, step: int, staging: Path, copied: Any, facts: Any) -> None:
        with self._writes(step):
            copied.result()
            _write(staging / _RUN, json.dumps(facts))
            files = sorted(path for path in staging.rglob("*") if path.is_file())
            listed = {
                path.relative_to(staging).as_posix(): _measure(path) for path in files
            }
            text = json.dumps({"files": listed})
            _write(staging / _MANIFEST, f"{text}\n{zlib.crc32(text.encode()):08x}\n")
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
        if not fine:  # what else was being written of it
            self._clear()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
        return fine

    def _give_up(self, staging: Path, error: InputError) -> None:
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
        damaged: list[tuple[int, Damaged]] = []
        for step in reversed(self.steps()):
            try:
                self.check(step, contents)
            except Damaged as error:
                logger.error("%s: %s; it is not used", self.path(step), error)
                damaged.append((step, error))
                continue
            if damaged:
                logger.error("going back to the checkpoint of step %d", step)
            return step, [bad for bad, _ in damaged]
        if damaged:
            step, error = damaged[0]
            raise InputError(
                f"{self.directory} has no checkpoint that is whole (the newest, of step"
                f" {step}: {error}); nothing there was changed: bring the files back, "
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

    def check(self, step: int, contents: bool = True) -> None:
        """That every file is as it was written; without `contents`, arrays by size.

        Raises:
            Damaged: naming the file.
        """
        path = self.path(step)
        for name, (size, checksum) in _read_manifest(path / _MANIFEST).items():
            file = path / name
            try:
                found = file.stat().st_size
                if found != size:
                    raise Damaged(f"{name} has {found} bytes, and had {size}")
                if (contents or name == _RUN) and _checksum(file) != checksum:
                    raise Damaged(f"{name} has other contents than were written")
            except FileNotFoundError:
                raise Damaged(f"{name} is missing") from None
            except OSError as error:
                raise Damaged(f"{name} cannot be read ({error.strerror})") from error

    def facts(self, step: int) -> Any:
        """What was saved beside the arrays, of a checkpoint that is whole."""
        return json.loads((self.path(step) / _RUN).read_text(encoding="utf-8"))

    def load(
        self, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """The arrays, with these shapes, dtypes and shardings."""
        path = self.path(step)
        with stage(f"{path}: the checkpoint cannot be loaded", "see save_directory"):
            return _checkpoint_library().load(path / _ARRAYS, dict(abstract))

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


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _measure(path: Path) -> tuple[int, int]:
    return path.stat().st_size, _checksum(path)


def _read_manifest(path: Path) -> dict[str, tuple[int, int]]:
    try:
        text, checksum, end = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read ({error.strerror})") from error
    except ValueError:  # other lines, or no text at all
        raise Damaged(f"{path.name} has other contents than were written") from None
    if end or checksum != f"{zlib.crc32(text.encode()):08x}":
        raise Damaged(f"{path.name} has other contents than were written")
    return {
        name: (size, crc) for name, (size, crc) in json.loads(text)["files"].items()
    }
