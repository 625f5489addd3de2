"""Rows of results: what was measured, on what, by which versions; one place for all.

A row is a flat dict. The first keys are the same in every row, null where one does not
apply; what is peculiar to a benchmark follows them.
"""

import datetime
import functools
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
MIB = 2**20

Row = dict[str, Any]


@functools.cache
def commit() -> str:
    """The commit that is checked out; `+` after it where files differ from it.

    Empty outside a checkout.
    """
    if shutil.which("git") is None:
        return ""

    def git(*words: str) -> str:
        done = subprocess.run(
            ("git", *words), cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", ".", ":!bench/results")
    return git("rev-parse", "--short", "--verify", "-q", "HEAD") + "+" * bool(changed)


def cpu_name() -> str:
    """The processor's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def row(
    op: str,
    implementation: str,
    *,
    T: int,
    D: int,
    V: int,
    dtype: str,
    device: str | None = None,
    seconds: float | None = None,
    flops: int | None = None,
    peak_tflops: float | None = None,
    peak_bytes: int | None = None,
    **extras: Any,
) -> Row:
    """One row; `seconds` and `flops` of one call give ms, TFLOP/s and % of peak."""
    tflops = None if seconds is None or flops is None else flops / seconds / 1e12
    share = None if tflops is None or not peak_tflops else 100 * tflops / peak_tflops
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": cpu_name() if device is None else device,
        "jax": version("jax"),
        "op": op,
        "implementation": implementation,
        "T": T,
        "D": D,
        "V": V,
        "dtype": dtype,
        "ms": _rounded(None if seconds is None else 1e3 * seconds),
        "tflops": _rounded(tflops),
        "pct_peak": _rounded(share),
        "peak_bytes": peak_bytes,
        "jaxlib": version("jaxlib"),
        "python": platform.python_version(),
        **extras,
    }


def _rounded(x: float | None) -> float | None:
    return None if x is None else float(f"{x:.4g}")


def write(name: str, rows: Sequence[Row]) -> Path:
    """Replace results/<name>.json: a JSON list, one row a line."""
    path = RESULTS / f"{name}.json"
    write_to(path, rows)
    return path


def write_to(path: Path, rows: Sequence[Row]) -> None:
    """As `write`, to any file; the old one stays until the new one is whole."""
    path.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(one) for one in rows)
    part = path.with_suffix(".part")
    part.write_text(f"[\n{lines}\n]\n")
    part.replace(path)


def read(path: Path) -> list[Row]:
    """The rows of a file; none where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else []


def others(path: Path, row: Row, *names: str) -> list[Row]:
    """The rows of a file that are not the same as `row` in all of these fields."""
    return [x for x in read(path) if any(x.get(name) != row[name] for name in names)]


def table(header: Sequence[str], cells: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, padded so that it reads well in a terminal too."""
    text = [[str(x) for x in line] for line in (header, *cells)]
    widths = [max(len(line[i]) for line in text) for i in range(len(header))]
    lines = [
        "| " + " | ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)) + " |"
        for line in text
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
