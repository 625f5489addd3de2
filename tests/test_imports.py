"""Imports point one way: cli, trainer, step, {losses, models, ...}, dpo_kernels."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the top down: a module imports from its own row and the rows below, in no circle.
# A package's row holds for its modules; a new module has to be given a place.
LAYERS = [
    {"engine.__main__"},
    {"engine.cli"},
    {"engine.run"},
    {"engine.trainer"},
    {"engine.preparation"},
    {"engine.step", "engine.optimizer", "engine.metrics"},
    {"engine.reference_model", "engine.scoring"},
    {"engine.data", "engine.sources"},
    {"engine.config", "engine.dpo_config", "engine.run_file"},
    {"engine.losses", "engine.models", "engine.sharding", "engine.rows"},
    {"engine.batching", "engine.tokenization", "engine.token_cache", "engine.batch"},
    {"engine.conversations", "engine.preference_rows"},
    {"engine", "engine.errors", "engine.fields"},
    {"dpo_kernels.verify", "dpo_kernels.verify_real"},
    {"dpo_kernels"},
]
# What dpo_kernels may import besides; a backend's toolkit only inside its functions, or
# in a module of kernels that is itself imported inside functions only.
KERNEL_NEEDS = {"jax", "jaxtyping", "numpy", *sys.stdlib_module_names}
TOOLKITS = {"jax_triton", "triton"}
TOOLKIT_MODULES = "triton_kernels"  # how their names end


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Each imported module, and whether that happens inside a function.

    What only a type checker imports is left out: nothing runs it.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", inside
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from imports(node, inside or function)


def row(module: str) -> int:
    """The layer of the longest listed prefix of `module`."""
    found = [
        (len(name), i)
        for i, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    return max(found)[1]


def check(sources: dict[str, str]) -> list[str]:
    """What is wrong with the imports of these modules, one line each."""
    problems, edges = [], {}
    for module, source in sources.items():
        edges[module] = set()
        for name, inside in imports(ast.parse(source)):
            top = name.split(".")[0]
            target = name if name in sources else name.rpartition(".")[0]
            target = target if target in sources else top
            if top in ("tests", "bench", "examples", "conftest"):
                problems.append(f"{module} imports {name}")
            elif target in sources:
                if row(target) < row(module):
                    problems.append(f"{module} imports {target}, which is above it")
                if target.endswith(TOOLKIT_MODULES) and not inside:
                    problems.append(f"{module} imports {target} where it is loaded")
                if not inside:
                    edges[module] |= loaded_with(target, module) & sources.keys()
            elif module.split(".")[0] == "dpo_kernels":
                lazy = inside or module.endswith(TOOLKIT_MODULES)
                lazy = lazy and top in TOOLKITS
                if top not in KERNEL_NEEDS and not lazy:
                    problems.append(f"{module} imports {name}")
    return problems + circles(edges)


def loaded_with(target: str, module: str) -> set[str]:
    """`target` and the packages around it, but for those that `module` is in."""
    parts = target.split(".")
    names = {".".join(parts[: i + 1]) for i in range(len(parts))}
    return {name for name in names if not f"{module}.".startswith(f"{name}.")}


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others, when they are loaded."""
    # Whatever imports nothing that is left is taken away; what remains goes in circles.
    left = dict(edges)
    while True:
        free = [m for m in left if not (edges[m] & left.keys()) - {m}]
        if not free:
            return [f"circle among {', '.join(sorted(left))}"] if left else []
        for module in free:
            del left[module]


def modules() -> dict[str, str]:
    """The source of every module of both packages."""
    found = {}
    for package in ("dpo_kernels", "engine"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path.read_text()
    return found


def test_imports_point_one_way():
    assert check(modules()) == []


def test_every_module_has_a_place():
    """What no row names would count as part of `engine`, which all may import."""
    listed = set().union(*LAYERS)
    lost = [
        name
        for name in modules()
        if name not in listed and row(name) == row("engine") and name != "engine"
    ]
    assert lost == []


@pytest.mark.parametrize(
    "module, source, expected",
    [
        ("engine.losses", "import engine.step", "engine.losses imports engine.step, "),
        ("engine.losses", "from engine import step", "losses imports engine.step, "),
        ("engine.losses", "from engine.step import f", "losses imports engine.step, "),
        ("engine.losses", "def f():\n import engine.step", "imports engine.step, "),
        ("engine.models.decoder", "import engine.step", "decoder imports engine.step"),
        ("dpo_kernels.loops", "import engine.errors", "loops imports engine.errors, "),
        ("dpo_kernels.loops", "import flax", "dpo_kernels.loops imports flax"),
        ("dpo_kernels.loops", "import triton", "dpo_kernels.loops imports triton"),
        (
            "dpo_kernels.loops",
            "import dpo_kernels.triton_kernels",
            "loops imports dpo_kernels.triton_kernels where it is loaded",
        ),
        ("engine.step", "import tests.helpers", "engine.step imports tests.helpers"),
        ("engine.step", "from bench import x", "engine.step imports bench.x"),
        ("engine.errors", "import engine.models", "errors imports engine.models, "),
        (
            "engine.sharding",
            "import engine.models",
            "circle among engine.models, engine.sharding",
        ),
        (
            "engine.sharding",
            "import engine.models.decoder",
            "circle among engine.models, engine.sharding",
        ),
    ],
)
def test_a_violation_is_seen(module, source, expected):
    sources = {
        "engine.step": "import engine.losses",
        "engine.losses": "import dpo_kernels.loops",
        "engine.models": "import engine.sharding, engine.models.decoder",
        "engine.models.decoder": "",
        "engine.sharding": "import engine.errors, jax, flax",
        "engine.errors": "",
        "dpo_kernels.loops": "import jax, numpy, functools\ndef f():\n import triton",
        "dpo_kernels.triton_kernels": "import triton",
    }
    assert check(sources) == []
    assert expected in check({**sources, module: source})[0]
