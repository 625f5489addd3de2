"""A folder with a model, pairs and a run file, and what a command says of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file, save_file

from engine.cli import main
from tests.engine.checkpoints import contents

MODEL = Path(__file__).parents[1] / "fixtures" / "trl" / "text" / "model"
ROWS = [
    {"prompt": "2+2?", "chosen": " 4", "rejected": " 5"},
    {"prompt": "Sky?", "chosen": " blue", "rejected": " green"},
    {"prompt": "Sea?", "chosen": " wet", "rejected": " dry"},
]
WEIGHTS = Path("model/model.safetensors")

Change = Callable[[], Any]


class Case:
    """Something that is wrong, and what is said of it.

    Args:
        said: how the one line begins; `...` stands for any text.
        change: spoils the folder.
        overrides: of the command line.
        sections: of the run file, over those that are right.
    """

    def __init__(
        self,
        said: str,
        change: Change | None = None,
        *,
        overrides: tuple[str, ...] = (),
        **sections: Any,
    ):
        self.said = said.split("...")
        self.change = change
        self.overrides = overrides
        self.sections = sections

    def matches(self, line: str) -> bool:
        """Whether the line begins as it should, with all that it should have."""
        start, *others = self.said
        at = len(start)
        for text in others:
            found = line.find(text, at)
            if found < 0:
                return False
            at = found + len(text)
        return line.startswith(start)


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """Makes the folder of a case, and goes there."""
    monkeypatch.chdir(folder)
    shutil.copytree(MODEL, "model")
    rows()
    config: dict[str, Any] = {
        "model": {"name_or_path": "model", "dtype": "float32"},
        "mixture": {"informs": [{"data_files": "pairs.jsonl"}]},
        "trainer": {"save_directory": "out", "total_batch_size": 8},
    }
    for name, value in case.sections.items():
        merged = config.get(name, {}) | value if isinstance(value, dict) else value
        config[name] = merged
    Path("run.yaml").write_text(yaml.safe_dump({"config": config}))
    if case.change is not None:
        case.change()


def refusal(
    command: str, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...]
) -> str:
    """The one line of a command that refuses, and changes no file."""
    before = contents(Path())
    code = main([command, "run.yaml", *overrides])
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("dpo: error: ")]
    assert code == 2 and errors == lines[-1:], lines
    assert contents(Path()) == before
    return errors[0].removeprefix("dpo: error: ")


# What spoils a folder.


def rows(*more: dict[str, Any], name: str = "pairs.jsonl") -> None:
    """Rows that are right, and more behind them."""
    lines = [json.dumps(row) + "\n" for row in (*ROWS, *more)]
    Path(name).write_text("".join(lines))


def row(**fields: Any) -> Change:
    """A fourth row, of a pair that is right but for these fields; None: none."""
    fields = {k: v for k, v in (ROWS[0] | fields).items() if v is not None}
    return lambda: rows(fields)


def write(name: str, data: str | bytes) -> Change:
    """A file."""

    def change() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data.encode() if isinstance(data, str) else data)

    return change


def edit(name: str, **values: Any) -> Change:
    """Other values in a JSON file."""

    def change() -> None:
        path = Path(name)
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def tensors(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Other tensors in the model's file."""

    def write() -> None:
        found = load_file(WEIGHTS)
        change(found)
        save_file(found, WEIGHTS, {"format": "pt"})

    return write


def remove(name: str) -> Change:
    """No such file."""
    return lambda: Path(name).unlink()


def rename(old: str, new: str) -> Change:
    """The same file under another name."""
    return lambda: Path(old).rename(new)


def both(*changes: Change) -> Change:
    """One after the other."""
    return lambda: [change() for change in changes]
