"""TensorBoard's event files: `tensorboard` in the save directory."""

import contextlib
import importlib
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import InputError, stage
from engine.training.events import Generation, Listener, Record

logger = logging.getLogger(__name__)

FOLDER = "tensorboard"


class TensorBoard(Listener):
    """Each line of metrics: of training as `train/NAME`, of a set as `eval/NAME`.

    Written at once and not by tensorboardX's thread: where that cannot write (a full
    disk) it ends, its queue fills, and who adds to it waits forever. Here a failure is
    one warning, and training goes on without. The events of an earlier run are kept in
    `tensorboard.1` and so on.
    """

    def __init__(self, directory: Path):
        self.path = directory / FOLDER
        self._writer: Any = None

    def started(self, total_steps: int, done: int) -> None:
        """Begin a file; of one that goes on, what came after step `done` is hidden."""
        try:
            with stage(f"{self.path} cannot be written"):
                if not done and self.path.is_dir() and any(self.path.iterdir()):
                    self._keep_earlier()
                self.path.mkdir(parents=True, exist_ok=True)
                # Here: it takes 0.2 s to import, and not every run wants it.
                from tensorboardX.event_file_writer import EventsWriter

                self._writer = EventsWriter(
                    str(self.path / "events"), f".{os.getpid()}.{done}"
                )
                if done:
                    event = _proto().Event(wall_time=time.time(), step=done + 1)
                    event.session_log.status = _proto().SessionLog.START
                    self._writer.write_event(event)
                self._writer.flush()
        except InputError as error:
            self._give_up(error)

    def _keep_earlier(self) -> None:
        number = 1
        while os.path.lexists(old := self.path.with_name(f"{FOLDER}.{number}")):
            number += 1
        os.rename(self.path, old)

    def recorded(self, record: Record) -> None:
        """Append one event, and flush it."""
        if self._writer is None:
            return
        event = _proto().Event(wall_time=time.time(), step=record.step)
        folder = record.prefix.rstrip("_") or "train"
        for name, value in record.metrics.items():
            name = name.removeprefix(record.prefix)
            if name != "step":
                event.summary.value.add(tag=f"{folder}/{name}", simple_value=value)
        self._write(event)

    def generated(self, step: int, generations: Sequence[Generation]) -> None:
        """Append them as one text, in Markdown."""
        if self._writer is None:
            return
        from tensorboardX.summary import text

        event = _proto().Event(wall_time=time.time(), step=step)
        event.summary.MergeFrom(text("generations", _markdown(generations)))
        self._write(event)

    def _write(self, event: Any) -> None:
        try:
            with stage(f"{self.path} cannot be written"):
                self._writer.write_event(event)
                self._writer.flush()
        except InputError as error:
            self._give_up(error)

    def _give_up(self, error: InputError) -> None:
        logger.warning("%s; training goes on without TensorBoard", error)
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(InputError), stage(str(self.path)):
                writer.close()

    def ended(self, error: BaseException | None) -> None:
        """Close the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                with stage(f"{self.path} cannot be written"):
                    writer.close()
            except InputError as fault:
                self._give_up(fault)


def _markdown(generations: Sequence[Generation]) -> str:
    """A block for each prompt; what is in it is code, which stays as it is."""
    blocks = []
    for one in generations:
        parts = [("prompt", one.prompt), ("policy", one.text)]
        if one.reference is not None:
            parts.append(("reference", one.reference))
        for name, words in parts:
            quoted = "\n".join(f"    {line}" for line in words.splitlines())
            blocks.append(f"**{name}**\n\n{quoted}")
    return "\n\n".join(blocks)


def _proto() -> Any:
    return importlib.import_module("tensorboardX.proto.event_pb2")
