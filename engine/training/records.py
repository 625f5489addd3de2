"""`run.json` in the save directory: what a run is, written before its first step."""

import datetime
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.config.show import plain
from engine.errors import InputError, stage
from engine.paths import as_path
from engine.training.compilation import Compiled
from engine.training.describe import describe, lines
from engine.training.events import Listener
from engine.training.prepare import Prepared

logger = logging.getLogger(__name__)

RECORD_NAME = "run.json"
_WRITER = "dpo-engine"


class RunRecord(Listener):
    """Writes the configuration with every default, and facts about the run.

    The file is written beside and renamed, so that it is whole or not there. One of an
    earlier run is kept under another name, `run.1.json` and so on.

    Args:
        config: sections by their names in a run file.
        facts: by what they are about; asked for when the run starts.
    """

    def __init__(
        self, directory: Path, config: Mapping[str, Any], facts: Mapping[str, str]
    ):
        self.path = directory / RECORD_NAME
        self._config = config
        self._facts = facts

    def started(self, total_steps: int, done: int) -> None:
        """Write the file."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = {
            "writer": _WRITER,
            "started": now,
            "from_step": done,
            "facts": dict(self._facts),
            "config": {name: plain(value) for name, value in self._config.items()},
        }
        with stage(f"{self.path} cannot be written", "see save_directory"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(self.path):
                self._check_ours()
                if not done:
                    self._keep_earlier()
            _write_whole(self.path, json.dumps(record, indent=1) + "\n")

    def _check_ours(self) -> None:
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            ours = not self.path.is_symlink() and record["writer"] == _WRITER
        except (OSError, ValueError, TypeError, KeyError):
            ours = False
        if not ours:
            raise InputError(
                f"{self.path} was not written by an earlier run; move it, or give "
                "another save_directory"
            )

    def _keep_earlier(self) -> None:
        number = 1
        while os.path.lexists(old := self.path.with_suffix(f".{number}.json")):
            number += 1
        os.rename(self.path, old)


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def described(run: Prepared, programs: Sequence[Compiled]) -> RunRecord:
    """Say what a run is, its compiled programs' memory too; who writes it down."""
    facts = describe(run, programs)
    logger.info("%s", lines(facts))
    directory = as_path(run.arguments.save_directory)
    return RunRecord(directory, run.about.config, facts)
