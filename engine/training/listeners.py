"""Where lines of metrics go: `metrics.jsonl`, the terminal, and all the others."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

from tqdm import tqdm

from engine.config.dpo import DPOConfig
from engine.errors import InputError, stage
from engine.paths import as_path
from engine.training.events import Generation, Listener, Record, Step
from engine.training.generations import GenerationsFile, excerpt
from engine.training.tensorboard import TensorBoard
from engine.training.wandb_run import WandB
from engine.training.watch import FallingChosen

logger = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
_SHOWN = {
    "loss": "loss",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
}


class MetricsFile(Listener):
    """`metrics.jsonl` in the save directory: full precision, one object a line.

    A file that is there already belongs to an earlier run: it is kept under another
    name, `metrics.1.jsonl` and so on.
    """

    def __init__(self, directory: Path):
        self.path = directory / FILE_NAME
        self._file: IO[str] | None = None

    def started(self, total_steps: int, done: int) -> None:
        """Make the directory; the file itself comes with its first line."""
        with stage(f"{self.path} cannot be written", "see save_directory"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(self.path) and (
                self.path.is_symlink() or not self.path.is_file()
            ):
                raise InputError(
                    f"{self.path} is a link or a directory, not a file of an earlier "
                    "run; move it, or give another save_directory"
                )
            if not done and self.path.exists():
                number = 1
                while os.path.lexists(old := self.path.with_suffix(f".{number}.jsonl")):
                    number += 1
                os.rename(self.path, old)
                logger.info("kept the metrics of an earlier run as %s", old)

    def recorded(self, record: Record) -> None:
        """Append one line, and flush it: a crash loses nothing that was written."""
        # NaN is no JSON: what is not finite is null.
        line = {
            name: None if isinstance(x, float) and not math.isfinite(x) else x
            for name, x in record.metrics.items()
        }
        with stage(f"{self.path} cannot be written", "see save_directory"):
            if self._file is None:
                # Held open: should another run rename it, it stays this one's.
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def size(self) -> int:
        """Bytes of the file, all of which are on the disk from now on."""
        with stage(f"{self.path} cannot be written", "see save_directory"):
            if self._file is not None:
                os.fsync(self._file.fileno())
            return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Take back the lines behind the first `size` bytes; before `started`."""
        with stage(f"{self.path} cannot be written", "see save_directory"):
            found = self.path.stat().st_size if self.path.exists() else 0
            if found > size:
                os.truncate(self.path, size)
            elif found < size:
                logger.warning(
                    "%s has %d bytes, and had %d when the run was saved: lines of "
                    "metrics are lost",
                    self.path,
                    found,
                    size,
                )

    def ended(self, error: BaseException | None) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Terminal(Listener):
    """A progress bar; plain lines where the output is no terminal."""

    def __init__(self, name: str, bar: bool):
        self._name = name
        self._wants_bar = bar
        self._bar: tqdm | None = None

    def started(self, total_steps: int, done: int) -> None:
        """Show the bar."""
        self._bar = tqdm(
            total=total_steps,
            initial=done,
            desc=self._name,
            unit="step",
            disable=None if self._wants_bar else True,  # None: where there is none
        )

    def stepped(self, step: Step) -> None:
        """Move the bar."""
        assert self._bar is not None
        self._bar.update(1)
        shown = ", ".join(f"{k} {step.metrics[m]:.3f}" for k, m in _SHOWN.items())
        self._bar.set_postfix_str(
            f"{shown}, {step.tokens_per_second:,.0f} tokens/s", refresh=False
        )

    def recorded(self, record: Record) -> None:
        """A line above the bar for an evaluation; without a bar, for each record."""
        assert self._bar is not None
        shown = ", ".join(f"{k} {record.metric(m):.4f}" for k, m in _SHOWN.items())
        name = record.prefix.rstrip("_").replace("_", " ")
        text = f"{name + ' ' if name else ''}step {record.step}: {shown}"
        if self._bar.disable:
            logger.info(text)
        elif record.kind == "eval":
            self._bar.write(text)

    def generated(self, step: int, generations: Sequence[Generation]) -> None:
        """One of them above the bar; the others are in the file."""
        assert self._bar is not None
        text = f"step {step}: {excerpt(generations)}"
        if self._bar.disable:
            logger.info("%s", text)
        else:
            self._bar.write(text)

    def ended(self, error: BaseException | None) -> None:
        """Close the bar; it stays on the screen."""
        if self._bar is not None:
            self._bar.close()


def own_listeners(
    arguments: DPOConfig, config: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[Listener]:
    """Those that every run tells after its `MetricsFile`, in their order.

    config: the whole one, by section, for who keeps it.
    """
    yield GenerationsFile(as_path(arguments.save_directory))
    yield Terminal(arguments.model_name, arguments.progress_bar)
    if not arguments.without_reference and "apo_down" not in arguments.losses:
        yield FallingChosen()
    if arguments.use_tensorboard:
        yield TensorBoard(as_path(arguments.save_directory))
    if arguments.use_wandb:
        directory = as_path(arguments.save_directory)
        yield WandB(arguments.model_name, directory, config)
