"""What is imported is declared in pyproject.toml: by the package, or by an extra."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"bench", "dpo_kernels", "engine", "tests"}
# Beside the dependencies: which extras a folder may count on.
EXTRAS = {
    "dpo_kernels": ("cuda13", "tpu"),
    "engine": ("cuda13", "plots"),
    "examples": ("plots",),
    "bench": ("cuda13", "peers", "plots", "test", "tpu"),
    "tests": ("cuda13", "test"),
}
# Comes with a declared package, in the version that goes with it.
COMES_WITH = {"jaxlib": "jax", "ml_dtypes": "jax", "tokenizers": "transformers"}
# A peer that whoever compares with it installs.
ELSEWHERE = {"trl"}


def names(requirements: list[str]) -> set[str]:
    """The distributions that requirements name, as `normal` has them."""
    return {normal(re.split(r"[\\[<>=;~! ]", line)[0]) for line in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, other than its neighbours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    beside = {other.stem for other in path.parent.glob("*.py")}
    return found - OURS - ELSEWHERE - beside - set(sys.stdlib_module_names)


@pytest.mark.parametrize("folder", EXTRAS)
def test_every_import_is_declared(folder):
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *(x for e in EXTRAS[folder] for x in extras[e])]
    declared = names(lines)
    distributions = importlib.metadata.packages_distributions()
    missing = set()
    for path in (ROOT / folder).rglob("*.py"):
        if "fixtures" in path.parts:  # scripts for environments of their own
            continue
        for package in imported(path):
            package = COMES_WITH.get(package, package)
            # A peer that is not installed here goes by its own name.
            found = {normal(name) for name in distributions.get(package, [package])}
            if not found & declared:
                missing.add((str(path.relative_to(ROOT)), package))
    assert not missing


def test_every_dependency_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = names([line for line in lines if not line.startswith("#")])
    assert names(PROJECT["dependencies"]) <= pinned
    assert names(PROJECT["optional-dependencies"]["plots"]) <= pinned


def test_only_what_is_imported_is_required():
    """By the packages themselves: what examples and tests need is in an extra."""
    distributions = importlib.metadata.packages_distributions()
    used = {
        normal(name)
        for folder in ("dpo_kernels", "engine")
        for path in (ROOT / folder).rglob("*.py")
        for package in imported(path)
        for name in distributions.get(package, [])
    }
    # Chat templates are rendered by transformers, which leaves jinja2 to its users; JAX
    # does so with filelock, by which processes share compiled programs.
    assert names(PROJECT["dependencies"]) - used <= {"filelock", "jinja2"}
