"""The TPU backend, compiled for TPUs that need not be here: does it fit?

    python -m bench.tpu.aot [--quick] [--tpu NAME]...

Compiles value-and-gradient of the public op in bfloat16 for v5e, v5p, v6e and 7x, on
one device and with the vocabulary sharded over four chips, and at shapes that are hard
to tile. Prints a table: the temporaries beside the promise (bench/op/memory.py) and the
kernels in the compiled program. Exits with 1 where a program does not compile (blocks
that do not fit into vector memory), takes more than the promise, or where `auto` chose
another backend. Nothing runs: bench.tpu.schedule predicts speed.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from bench import processes, rows
from bench.aot import VARIANTS, compile_op
from bench.op.memory import SPARE, TARGETS, WORKSPACE
from bench.tpu.chips import CHIPS

SHAPES = (
    (4096, 4096, 128256),
    (8192, 2304, 256000),
    (4096, 4096, 151936),
    (2048, 8192, 128256),
    (16384, 8192, 128256),
)
# Narrow and wide rows, few and odd ones, odd vocabularies: on a core with 128 MiB of
# vector memory and on one with 64.
HARD = (
    (4096, 1024, 32000),
    (4096, 2560, 50257),
    (4096, 7168, 32000),
    (4096, 16384, 32000),
    (1, 4096, 50257),
    (100, 4096, 50257),
    (5000, 4096, 50257),
    (4096, 4096, 49152 // 8),
)
HARD_ON = ("v6e", "7x")
# Devices that the vocabulary is sharded over: four chips. On 7x each is two.
PARALLEL = {"v5e": 4, "v5p": 4, "v6e": 4, "7x": 8}
# What is compiled for has to be whole: four of v5e's sixteen would not do.
TOPOLOGIES = {name: chip.topology for name, chip in CHIPS.items()} | {"v5e": "v5e:2x2"}
FORWARD = "token_logprobs_forward"
BACKWARD = "token_logprobs_backward"


@dataclass(frozen=True, kw_only=True)
class Program:
    """One program to compile."""

    generation: str
    shape: tuple[int, int, int]  # T, D, V
    devices: int = 1
    variant: str = "engine"


def programs(quick: bool, generations: Sequence[str] = tuple(CHIPS)) -> list[Program]:
    """Everything; with `quick`, what the engine calls at one shape on each TPU."""
    found = []
    for generation in generations:
        first, *others = SHAPES
        found.append(Program(generation=generation, shape=first))
        if quick:
            continue
        for variant in ("plain", "everything"):
            found.append(Program(generation=generation, shape=first, variant=variant))
        devices = PARALLEL[generation]
        found.append(Program(generation=generation, shape=first, devices=devices))
        found += [Program(generation=generation, shape=shape) for shape in others]
        if generation in HARD_ON:
            # With everything on, most has to fit.
            found += [
                Program(generation=generation, shape=shape, variant="everything")
                for shape in HARD
            ]
    return found


def kernels(text: str) -> list[str]:
    """The names of our kernels in a compiled program."""
    calls = [line for line in text.splitlines() if "tpu_custom_call" in line]
    found = re.findall(r"token_logprobs_[a-z]+(?<!_)", "\n".join(calls))
    return sorted(set(found))


def _mesh(program: Program) -> Any:
    import jax
    import numpy as np
    from jax.experimental import topologies

    name = TOPOLOGIES[program.generation]
    found = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    return jax.sharding.Mesh(np.array(found[: program.devices]), ("vocab",))


def compile_row(program: Program) -> rows.Row:
    """Its row, which has `error` where it does not compile."""
    from jax.errors import JaxRuntimeError

    start = time.perf_counter()
    facts: dict[str, Any] = {}
    try:
        compiled = compile_op(
            _mesh(program),
            "auto",
            program.shape,
            WORKSPACE,
            dict(VARIANTS)[program.variant],
        )
        facts["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
        facts["kernels"] = kernels(compiled.as_text())
    except (JaxRuntimeError, ValueError, NotImplementedError) as error:
        lines = f"{type(error).__name__}: {error}".splitlines()
        facts["error"] = " ".join(x for x in lines if x.strip())[:500]
    return _row(program, **facts, compile_s=round(time.perf_counter() - start, 1))


def _row(program: Program, **facts: Any) -> rows.Row:
    T, D, V = program.shape
    return rows.row(
        "token_logprobs, forward and gradient",
        "auto",
        T=T,
        D=D,
        V=V,
        dtype="bfloat16",
        device=_device(program.generation),
        compiler=f"libtpu {version('libtpu')}",
        devices=program.devices,
        variant=program.variant,
        workspace_bytes=WORKSPACE,
        bound_bytes=WORKSPACE + 4 * T * D + SPARE,
        **facts,
    )


def problems(row: rows.Row) -> list[str]:
    """What is wrong with it; nothing, if it keeps every promise."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    found = []
    if row["temp_bytes"] > row["bound_bytes"]:
        found.append("temporaries above the bound")
    if FORWARD not in row["kernels"]:
        found.append("auto did not choose pallas_tpu")
    elif BACKWARD not in row["kernels"]:
        found.append("no gradient's kernel was compiled")
    return found


def show(results: Sequence[rows.Row]) -> str:
    """The table."""

    def mib(row: rows.Row, key: str) -> str:
        return f"{row[key] / rows.MIB:,.1f}" if key in row else ""

    cells = [
        (
            row["device"].split(",")[0],
            *(row[key] for key in ("T", "D", "V", "devices", "variant")),
            ", ".join(
                name.removeprefix("token_logprobs_") for name in row.get("kernels", ())
            ),
            *(mib(row, "temp_bytes"), mib(row, "bound_bytes")),
            row["compile_s"],
            "; ".join(problems(row))[:100] or "yes",
        )
        for row in results
    ]
    header = ("device", "T", "D", "V", "devices", "variant", "kernels")
    header += ("temporaries MiB", "bound MiB", "compiled in s", "within")
    return rows.table(header, cells)


def measure_elsewhere(wanted: Sequence[Program]) -> Iterator[rows.Row]:
    """A row for each, as it comes, from processes that are made for absent TPUs.

    The compiler ends its process on some errors: the program that it was at gets a row
    that says so, and the others go on in a new one.
    """
    # Other processes may compile at the same time; there is no TPU to share.
    changes = {**TARGETS["v6e"].environment, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    left = list(wanted)
    while left:
        words = ["--worker", *(json.dumps(asdict(program)) for program in left)]
        try:
            for row in processes.ask_as_it_goes("bench.tpu.aot", words, changes):
                left.pop(0)
                yield row
            assert not left, "a worker that ends well has answered for every program"
        except processes.ProcessError as died:
            if left:
                error = f"the compiler died: {died}"
                yield _row(left.pop(0), error=error, compile_s=0.0)


def _device(generation: str) -> str:
    return f"TPU {generation}, ahead of time"


def main(argv: list[str] | None = None) -> int:
    """Print the table and write the rows; 1 where something does not fit."""
    parser = argparse.ArgumentParser(prog="python -m bench.tpu.aot")
    parser.add_argument(
        "--quick", action="store_true", help="one program a TPU; writes no rows"
    )
    parser.add_argument(
        "--tpu", action="append", choices=CHIPS, help="some; the others' rows are kept"
    )
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        for word in args.worker:
            fields = json.loads(word)
            program = Program(**fields | {"shape": tuple(fields["shape"])})
            processes.answer(compile_row(program))
        return 0
    chosen = args.tpu or list(CHIPS)
    path = rows.RESULTS / "tpu_aot.json"
    devices = {_device(generation) for generation in chosen}
    kept = [row for row in rows.read(path) if row["device"] not in devices]
    results = []
    for row in measure_elsewhere(programs(args.quick, chosen)):
        results.append(row)
        shape = f"T={row['T']} D={row['D']} V={row['V']} on {row['devices']}"
        state = "; ".join(problems(row)) or "fits"
        print(f"{row['device']} {shape} {row['variant']}: {state}", flush=True)
        if not args.quick:
            rows.write_to(path, [*kept, *results])
    print(f"\n{show(results)}")
    if not args.quick:
        print("wrote", path.relative_to(rows.ROOT))
    return 1 if any(problems(row) for row in results) else 0


if __name__ == "__main__":
    sys.exit(main())
