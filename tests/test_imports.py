"""Imports point one way: the contracts of `[tool.importlinter]` in pyproject.toml."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What `import dpo_kernels` may load besides itself; kernels' toolkits come with the
# first call that needs one.
ALLOWED = {"jax", "jaxtyping", "numpy", "dpo_kernels", *sys.stdlib_module_names}
TOOLKITS = {"jax_triton", "triton"}


def lint(root: Path) -> tuple[int, str]:
    """The exit status of import-linter, and what it prints."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_rooms_import_one_way():
    status, printed = lint(ROOT)
    assert status == 0, printed


@pytest.mark.parametrize(
    "module, line, broken",
    [
        (
            "engine/objective/losses.py",
            "import engine.training.step",
            "rooms of engine",
        ),
        ("engine/models/rope.py", "import engine.models.decoder", "no circles"),
        ("dpo_kernels/op/loops.py", "import engine.errors", "at the bottom"),
        ("dpo_kernels/op/loops.py", "import dpo_kernels.xla.sums", "of dpo_kernels"),
        ("engine/errors.py", "import bench.rows", "at the bottom"),
        (
            "engine/parallel/sharding.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
            "    from engine.models.decoder import Decoder",
            "rooms of engine",
        ),
    ],
)
def test_a_violation_is_seen(tmp_path, module, line, broken):
    """In a copy, with one import added."""
    for package in ("dpo_kernels", "engine", "bench", "tests"):
        for path in (ROOT / package).rglob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text())
    path = tmp_path / module
    path.write_text(f"{path.read_text()}\n{line}\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    status, printed = lint(tmp_path)
    failed = [one for one in printed.splitlines() if one.endswith("BROKEN")]
    assert status == 1 and any(broken in one for one in failed), printed


def loaded_packages(path: Path) -> set[str]:
    """The packages that a file of `dpo_kernels` imports, outside its functions."""
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: a relative import"
            found.add(node.module.split(".")[0])
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "dpo_kernels").rglob("*.py")),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_dpo_kernels_needs_jax_alone(path):
    allowed = ALLOWED
    if path.parent.name == "triton" and path.name.endswith("kernels.py"):
        allowed = ALLOWED | TOOLKITS  # itself imported inside functions only
    assert loaded_packages(path) <= allowed


def test_toolkits_are_loaded_lazily():
    """Every module but Triton's kernels loads where no toolkit is installed."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "dpo_kernels").rglob("*.py"))
        if not (path.parent.name == "triton" and path.name.endswith("kernels.py"))
        and path.name != "__main__.py"
    ]
    code = (
        "import sys, importlib\n"
        f"for name in {sorted(TOOLKITS)}: sys.modules[name] = None\n"
        f"for name in {names}: importlib.import_module(name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
