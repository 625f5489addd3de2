"""What a run has left in its folder, read back: metrics, configuration, facts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import InputError, shown, stage
from engine.paths import as_path
from engine.training.listeners import FILE_NAME
from engine.training.records import RECORD_NAME

EVAL = "eval_"
GENERATIONS_NAME = "generations.jsonl"
_LEAST, _MOST = 1e-46, 1e39  # beyond what float32 holds
_LOSS = "loss"  # which every line of metrics has

Points = list[tuple[float, float | None]]  # step and value; None: it was not finite


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run's folder."""

    name: str  # as it was given
    lines: Sequence[Mapping[str, Any]]  # of metrics.jsonl
    config: Mapping[str, Any] = field(default_factory=dict)  # by dotted key
    facts: Mapping[str, str] = field(default_factory=dict)
    generations: Sequence[Mapping[str, Any]] = ()  # step, prompt, text
    notes: Sequence[str] = ()  # what the reader of the page has to know

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Of the metrics' names: "" for training, then each evaluation set's."""
        found = dict.fromkeys(
            name.removesuffix(_LOSS)
            for line in self.lines
            for name in line
            if name.startswith(EVAL) and name.endswith(_LOSS) and "/" not in name
        )
        return ("", *found)

    def points(self, name: str) -> Points:
        """The steps at which a metric was written, and its values."""
        return [(line["step"], line[name]) for line in self.lines if name in line]

    def names(self) -> tuple[str, ...]:
        """Every metric's name, in the order of the file."""
        return tuple(dict.fromkeys(name for line in self.lines for name in line))


def read_run(directory: str | Path) -> Run:
    """Read what a run has written so far.

    Raises:
        InputError: no metrics there, or a line of them that is none.
    """
    folder = as_path(directory)
    path = folder / FILE_NAME
    if not path.is_file():
        hint = "it is not a folder" if not folder.is_dir() else "no run has begun there"
        raise InputError(
            f"{path}: there is no such file ({hint}); give the save_directory of a run"
        )
    notes: list[str] = []
    lines = list(_lines(path, notes))
    if not lines:
        raise InputError(f"{path}: it has no line yet; wait for the run's first")
    record = _record(folder / RECORD_NAME, notes)
    return Run(
        name=str(directory),
        lines=lines,
        config=flat(record.get("config", {})),
        facts=record.get("facts", {}),
        generations=_generations(folder / GENERATIONS_NAME),
        notes=notes,
    )


def _lines(path: Path, notes: list[str]) -> Iterator[Mapping[str, Any]]:
    with stage(f"{path} cannot be read"):
        text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            notes.append(f"line {number} of {FILE_NAME} is incomplete, and left out")
            return
        yield _line(f"{path}: line {number}", line)


def _line(where: str, text: str) -> Mapping[str, Any]:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{where} is not JSON; remove that line") from None
    if not isinstance(line, dict) or not _is_number(line.get("step")):
        raise InputError(f"{where} is no line of metrics, which has a `step`")
    for name, value in line.items():
        if value is not None and not _is_number(value):
            raise InputError(f"{where}: {name}={shown(value)} must be a number or null")
    return line


def _generations(path: Path) -> list[Mapping[str, Any]]:
    """What the model wrote to some prompts, at some steps; none where there is none."""
    if not path.is_file():
        return []
    with stage(f"{path} cannot be read", "remove it to do without"):
        # Not splitlines(): JSON strings may hold other line breaks.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        found = [json.loads(line) for line in lines]
    for number, line in enumerate(found, start=1):
        texts = isinstance(line, dict) and (line.get("prompt"), line.get("text"))
        texts = texts and all(isinstance(text, str) for text in texts)
        if not texts or not _is_number(line.get("step")):
            raise InputError(
                f"{path}: line {number} must have `step`, `prompt` and `text`; remove "
                "the file to do without"
            )
    return found


def _is_number(value: Any) -> bool:
    """Whether it is a number that training, in float32, can have written."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == 0 or _LEAST <= abs(value) <= _MOST


def _record(path: Path, notes: list[str]) -> Mapping[str, Any]:
    if not path.is_file():
        notes.append(f"there is no {RECORD_NAME}, so its configuration is not known")
        return {}
    with stage(f"{path} cannot be read", "remove it to do without"):
        record = json.loads(path.read_text(encoding="utf-8"))
    parts = ("config", "facts")
    sections = isinstance(record, dict) and [record.get(part, {}) for part in parts]
    if not (
        sections
        and all(isinstance(section, dict) for section in sections)
        and all(isinstance(text, str) for text in sections[1].values())
    ):
        raise InputError(
            f"{path} is no record of a run, a JSON object with config and facts, "
            "which are texts; remove it to do without"
        )
    return record


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration by dotted key; entries of lists of sections by their index."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(i): entry for i, entry in enumerate(value)}
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
