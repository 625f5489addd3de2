"""A run of Weights & Biases: `wandb` and `wandb_run.json` in the save directory."""

import contextlib
import importlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.config.show import plain
from engine.errors import InputError, stage
from engine.training.events import Generation, Listener, Record

logger = logging.getLogger(__name__)

FILE_NAME = "wandb_run.json"
_COLUMNS = "step", "set", "prompt", "policy", "reference"


class WandB(Listener):
    """Logs every line of metrics and all answers; DPOConfig has looked for the package.

    A run that goes on does so under the same id, which is kept beside its metrics. What
    it repeats of the lines behind its checkpoint is logged already, and stays.

    Args:
        name: of the run.
        config: the whole configuration, by section.
    """

    def __init__(self, name: str, directory: Path, config: Mapping[str, Any]):
        self._name = name
        self._directory = directory
        self._config = config
        self._run: Any = None
        self._warned = False

    def started(self, total_steps: int, done: int) -> None:
        """Begin the run, or go on with it."""
        path = self._directory / FILE_NAME
        known = {}
        if done and path.is_file():
            with stage(f"{path} cannot be read", "remove it to begin another run"):
                known["id"] = str(json.loads(path.read_text(encoding="utf-8"))["id"])
        with stage("Weights & Biases cannot begin a run", "or set use_wandb to false"):
            self._directory.mkdir(parents=True, exist_ok=True)
            self._run = importlib.import_module("wandb").init(
                name=self._name,
                dir=str(self._directory),
                config={name: plain(value) for name, value in self._config.items()},
                resume="allow",
                **known,
            )
        with stage(f"{path} cannot be written", "see save_directory"):
            part = path.with_name(f".{FILE_NAME}.part")
            part.write_text(json.dumps({"id": self._run.id}), encoding="utf-8")
            os.replace(part, path)

    def recorded(self, record: Record) -> None:
        """Log the line under its step."""
        self._log(dict(record.metrics), record.step)

    def generated(self, step: int, generations: Sequence[Generation]) -> None:
        """Log all of them as a table."""
        rows = [[step, x.set_name, x.prompt, x.text, x.reference] for x in generations]
        with self._forgiven("takes no table"):
            table = importlib.import_module("wandb").Table(list(_COLUMNS), data=rows)
            self._log({"generations": table}, step)

    def _log(self, values: dict[str, Any], step: int) -> None:
        assert self._run is not None
        with self._forgiven("takes no more metrics"):
            self._run.log(values, step=step)

    def ended(self, error: BaseException | None) -> None:
        """End the run."""
        if self._run is not None:
            with self._forgiven("did not end the run"):
                self._run.finish(exit_code=int(error is not None))

    @contextlib.contextmanager
    def _forgiven(self, what: str) -> Iterator[None]:
        """A service that is away is no reason to stop training: one warning."""
        try:
            with stage(f"Weights & Biases {what}"):
                yield
        except InputError as error:
            if not self._warned:
                logger.warning("%s; training goes on", error)
            self._warned = True
