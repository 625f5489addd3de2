"""What `make test` compiles for absent devices, kept as rows while nothing changes.

    python -m bench.compiled [--target tpu] [--target gpu]

Compiling the kernels for TPUs and GPUs that are not here takes minutes, and gives the
same as long as what goes in is the same. So a row of `results/compiled.json` carries
a key: a hash of the sources that decide its program, of the versions of JAX and of the
compiler, and of the program itself. `rows_of` gives the rows whose keys still hold, and
compiles the other programs: it is right either way, and fast where the rows are up to
date. This command compiles what has changed and writes it down; a program with a
problem is not written, and the exit code is 1.

Sources are all that the op and its backend import of `dpo_kernels`, and the benchmark's
own files that are named below; comments, docstrings and layout do not count.
"""

import argparse
import ast
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from bench import rows
from bench.aot import VARIANTS
from bench.gpu import aot as gpu_aot
from bench.op.memory import SPARE, WORKSPACE
from bench.tpu import aot as tpu_aot

PATH = rows.RESULTS / "compiled.json"
# Of all compilers, and of what comes between them and the kernels.
COMPILERS = ("jax", "jaxlib")
# What changes programs from outside.
ENVIRONMENT = ("LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION")


class Compiler(Protocol):
    """`bench.tpu.aot` or `bench.gpu.aot`: what is wrong with a row."""

    def problems(self, row: rows.Row) -> list[str]:
        """Nothing, if it keeps every promise."""
        ...


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of device: its programs, and what decides how they come out."""

    modules: tuple[str, ...]  # with all that they import of dpo_kernels
    files: tuple[str, ...]  # by themselves
    packages: tuple[str, ...]
    compiler: Compiler


TARGETS = {
    "tpu": Target(
        modules=("dpo_kernels.token_logprobs", "dpo_kernels.pallas_tpu.logprobs"),
        # `auto` asks mosaic_gpu first: whether it declines is in its own file.
        files=("dpo_kernels/mosaic_gpu/logprobs.py", "bench/aot.py")
        + ("bench/tpu/aot.py", "bench/tpu/chips.py"),
        packages=("libtpu",),
        compiler=tpu_aot,
    ),
    "gpu": Target(
        modules=("dpo_kernels.token_logprobs", "dpo_kernels.mosaic_gpu.logprobs")
        + ("dpo_kernels.triton.logprobs", "dpo_kernels.triton.kernels"),
        files=("bench/aot.py", "bench/gpu/aot.py", "engine/planning/h200.textproto"),
        packages=("jax-cuda13-plugin", "jax-cuda13-pjrt", "jax-triton", "triton"),
        compiler=gpu_aot,
    ),
}
LARGE = (4096, 1024, 151936)  # D and V of Qwen3 0.6B, which compiles fast
# Fewer rows than a register has; and some that end within a tile of memory.
FEW_ROWS = ((1, 1024, 3000), (17, 1024, 3000))


def tpu_programs() -> list[tpu_aot.Program]:
    """With everything on; few rows; as the engine calls it, vocabulary over chips."""
    everything = [
        tpu_aot.Program(generation=name, shape=shape, variant="everything")
        for shape in (LARGE, *FEW_ROWS)
        for name in tpu_aot.PARALLEL
    ]
    devices = tpu_aot.PARALLEL["7x"]
    return [*everything, tpu_aot.Program(generation="7x", shape=LARGE, devices=devices)]


def programs(target: str) -> list[dict[str, Any]]:
    """What `make test` compiles for it, each as a row has it."""
    if target == "tpu":
        found = [asdict(program) for program in tpu_programs()]
    else:
        names = ("implementation", "shape", "devices", "workspace_bytes", "variant")
        quick = gpu_aot.programs(quick=True)
        found = [dict(zip(names, one, strict=True)) for one in quick]
    return [one | {"shape": list(one["shape"])} for one in found]


def _compile(target: str, wanted: Sequence[dict[str, Any]]) -> Iterator[rows.Row]:
    """A row for each."""
    if target == "tpu":
        every = tpu_programs()
        pairs = zip(every, programs(target), strict=True)
        chosen = [program for program, named in pairs if named in wanted]
        yield from tpu_aot.measure_elsewhere(chosen)
    else:
        pairs = zip(
            programs(target), gpu_aot.measure_elsewhere(quick=True), strict=True
        )
        yield from (row for program, row in pairs if program in wanted)


def _path(module: str) -> Path | None:
    """The file of a module, if it is one."""
    stem = rows.ROOT.joinpath(*module.split("."))
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file():
            return path
    return None


def _imports(tree: ast.AST) -> Iterator[str]:
    """Every name that may be a module, inside functions as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _with_packages(module: str) -> Iterator[str]:
    """A module, and the packages that importing it imports."""
    words = module.split(".")
    yield from (".".join(words[: n + 1]) for n in range(len(words)))


@functools.cache
def sources(target: str) -> list[Path]:
    """The files that decide the target's programs."""
    left = list(TARGETS[target].modules)
    found = {rows.ROOT / name for name in TARGETS[target].files}
    seen: set[str] = set()
    while left:
        for module in _with_packages(left.pop()):
            path = _path(module)
            if module in seen or path is None or not module.startswith("dpo_kernels"):
                continue
            seen.add(module)
            found.add(path)
            left += _imports(ast.parse(path.read_text()))
    return sorted(found)


@functools.cache
def meaning(path: Path) -> str:
    """What a file says to the interpreter: no comments, docstrings or layout."""
    text = path.read_text()
    if path.suffix != ".py":
        return text
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
    return ast.unparse(tree)


@functools.cache
def _made_from(target: str) -> dict[str, Any]:
    """Everything that all programs of a target depend on."""
    names = (*COMPILERS, *TARGETS[target].packages)
    return {
        "sources": {
            str(path.relative_to(rows.ROOT)): meaning(path) for path in sources(target)
        },
        "versions": {name: version(name) for name in names},
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "bytes": [WORKSPACE, SPARE],
        "variants": VARIANTS,
    }


def key(target: str, program: dict[str, Any]) -> str:
    """The hash of all that a program is made from."""
    text = json.dumps([_made_from(target), program], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def recorded(target: str) -> list[rows.Row]:
    """The rows whose programs would come out the same today."""
    keys = {key(target, program) for program in programs(target)}
    return [row for row in rows.read(PATH) if row["key"] in keys]


def rows_of(target: str) -> list[rows.Row]:
    """A row for each of `programs`: the recorded one, or else one compiled now."""
    found = {row["key"]: row for row in recorded(target)}
    left = [one for one in programs(target) if key(target, one) not in found]
    for program, row in zip(left, _compile(target, left) if left else (), strict=True):
        found[key(target, program)] = {"key": key(target, program), **row}
    return [found[key(target, program)] for program in programs(target)]


def main(argv: list[str] | None = None) -> int:
    """Compile and record what has changed; 1 where something is wrong with it."""
    parser = argparse.ArgumentParser(prog="python -m bench.compiled")
    parser.add_argument("--target", action="append", choices=TARGETS)
    args = parser.parse_args(argv)
    kept, failed = [], 0
    for target in TARGETS:
        if args.target and target not in args.target:
            kept += recorded(target)
            continue
        known = {row["key"] for row in recorded(target)}
        for row in rows_of(target):
            wrong = "; ".join(TARGETS[target].compiler.problems(row))
            state = "as recorded" if row["key"] in known else f"{row['compile_s']} s"
            shape = f"T={row['T']} D={row['D']} V={row['V']} on {row['devices']}"
            print(f"{row['device']} {row['implementation']} {shape} {row['variant']}:")
            print(f"  {wrong or 'fits'} ({state})", flush=True)
            kept += [] if wrong else [row]
            failed += bool(wrong)
    rows.write_to(PATH, kept)
    print("wrote", PATH.name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
