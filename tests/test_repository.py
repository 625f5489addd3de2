"""Limits that keep the code readable, held for every Python file.

ruff has the rest of them: see `[tool.ruff.lint]` in pyproject.toml.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    path
    for folder in ("dpo_kernels", "engine", "tests", "bench", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
FILE_LINES = 320
FUNCTION_LINES = 60
KERNEL_LINES = 120  # a kernel body is one loop, and reads worse in pieces
KERNELS = tuple(
    f"dpo_kernels/{room}/" for room in ("mosaic_gpu", "pallas_tpu", "triton", "xla")
)


def docstring_lines(node: ast.FunctionDef) -> int:
    """How long its docstring is, which may be as long as its arguments are many."""
    first = node.body[0]
    if ast.get_docstring(node) is None:
        return 0
    assert first.end_lineno is not None
    return first.end_lineno - first.lineno + 1


def complaints(path: str, source: str) -> Iterator[str]:
    """What a reader would stumble over in one file."""
    lines = source.splitlines()
    if len(lines) > FILE_LINES:
        yield f"{path} has {len(lines)} lines; split it"
    limit = KERNEL_LINES if path.startswith(KERNELS) else FUNCTION_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1 - docstring_lines(node)
            if length > limit:
                yield f"{path}: {node.name} has {length} lines; split it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_readable(path):
    if path != Path(__file__):
        name = str(path.relative_to(ROOT))
        assert list(complaints(name, path.read_text())) == []


@pytest.mark.parametrize(
    "path, source, count",
    [
        ("engine/a.py", "x = 1\n" * 320, 0),
        ("engine/a.py", "x = 1\n" * 321, 1),
        ("engine/a.py", "def f():\n" + " x = 1\n" * 59, 0),
        ("engine/a.py", "def f():\n" + " x = 1\n" * 60, 1),
        ("engine/a.py", "def f():\n '''\n'''\n" + " x = 1\n" * 59, 0),
        ("dpo_kernels/triton/a.py", "def f():\n" + " x = 1\n" * 60, 0),
    ],
)
def test_limits_are_held(path, source, count):
    assert len(list(complaints(path, source))) == count


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("x = 1  # TO" + "DO: y", "FIX002"),
        ("x = 1  # HA" + "CK", "FIX004"),
        ("try:\n    x = f()\nexcept:\n    x = 1", "E722"),
        ("try:\n    x = f()\nexcept Exception:\n    x = 1", "BLE001"),
    ],
)
def test_ruff_holds_the_rest(source, rule):
    ruff = Path(sys.executable).with_name("ruff")
    done = subprocess.run(
        [ruff, "check", "--output-format=concise", "--stdin-filename=engine/a.py", "-"],
        input=f'"""A module."""\n{source}\n',
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert rule in done.stdout, done.stdout + done.stderr


def test_every_installed_version_is_pinned_exactly():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r"[\w.-]+==[\w.+]+", pin), pin
    assert len({pin.split("==")[0].lower() for pin in pins}) == len(pins)
