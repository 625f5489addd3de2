"""`dpo report`: one HTML page of what runs have written."""

import os
from collections.abc import Sequence
from pathlib import Path

from engine.config.run import RunConfig
from engine.config.show import defaults
from engine.errors import InputError, stage
from engine.paths import as_path
from engine.reports.page import page
from engine.reports.runs import read_run

PAGE_NAME = "report.html"


def main(directories: Sequence[str], output: str | None = None) -> Path:
    """Write the page, and say where it is.

    Args:
        directories: of runs, each with its metrics.jsonl.
        output: None: `report.html` in the first of them.
    Raises:
        InputError: a directory without metrics, or a page that cannot be written.
    """
    if len(set(directories)) < len(directories):
        raise InputError("a run is given twice; give each once")
    runs = [read_run(directory) for directory in directories]
    path = as_path(output) if output else as_path(directories[0]) / PAGE_NAME
    part = path.with_name(f".{path.name}.part")
    text = page(runs, defaults(RunConfig))
    with stage(f"{path} cannot be written", "give another place with --output"):
        # Half a character, which a name or a text may hold, is no reason to have none.
        part.write_text(text, encoding="utf-8", errors="replace")
        os.replace(part, path)
    print(f"wrote {path}")
    return path
