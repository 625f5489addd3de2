"""What each option saves of a device's memory: Llama-3.1-8B on eight absent devices.

    JAX_PLATFORMS=cpu python -m bench.step.memory_options [--only 8bit] [--show]

The engine's own step (policy, reference, backward, AdamW; parameters float32, products
bfloat16, remat full, every device on the fsdp axis), two pairs of 2,048 tokens on each
device, compiled ahead of time as `dpo plan` does; nothing runs. The devices are H200s,
and v5p chips for what a compiler for absent NVIDIA devices does not know: arguments in
the host's memory. Bytes are a device's:

    held_bytes        what it holds throughout, by what it is
    reference_on_host_bytes  of its host's memory
    peak_bytes        that and the step's temporaries
    temporary_bytes   of which gradient_bytes are the gradients
    collectives       what a step moves between devices

Rows are written as they come, those of other options stay.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import processes, rows
from bench.step.plan_cases import LLAMA_8B, run_of, write_config

H200, V5P = "h200:8", "v5p:2x2x2"
PAIRS, LENGTH = 2, 2048
PATH = rows.RESULTS / "memory_options.json"


@dataclass(frozen=True, kw_only=True)
class Option:
    """A run with some options that are not at their defaults."""

    name: str
    target: str = H200
    trainer: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


OPTIONS = (
    Option(name="float32 moments"),
    Option(name="bfloat16 first moments", trainer={"mu_dtype": "bfloat16"}),
    Option(
        name="bfloat16 moments",
        trainer={"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"},
    ),
    Option(name="8bit moments", trainer={"mu_dtype": "8bit", "nu_dtype": "8bit"}),
    Option(name="layers' inputs in the host's memory", model={"remat": "offload"}),
    Option(name="gradients added up in float32", model={"reduce_dtype": "float32"}),
    Option(name="float32 moments", target=V5P),
    Option(
        name="layers' inputs in the host's memory",
        target=V5P,
        model={"remat": "offload"},
    ),
    Option(
        name="reference in the host's memory",
        target=V5P,
        trainer={"offload_ref_model": True},
    ),
)


def row_of(option: Option, folder: Path) -> rows.Row:
    """Compile the step, and what its compiler says of it."""
    from engine.planning.account import as_json, take_account
    from engine.planning.devices import devices_of
    from engine.planning.models import model_configs
    from engine.planning.steps import make_step
    from engine.planning.targets import parse_target

    target = parse_target(option.target)
    run = run_of(
        write_config(LLAMA_8B, folder),
        PAIRS * target.count,
        LENGTH,
        options=option.model,
        trainer=option.trainer,
    )
    mesh = run.sharding.mesh(devices_of(target))
    found = as_json(take_account(make_step(run, *model_configs(run), mesh), target))
    kept = ("fits", "capacity_bytes", "held_bytes", "gradient_bytes")
    kept += ("reference_on_host_bytes",)
    kept += ("temporary_bytes", "collectives", "least_s", "most_s", "compile_s")
    return rows.row(
        "DPO step, planned",
        option.name,
        T=found["scored_capacity"],
        D=LLAMA_8B["hidden_size"],
        V=LLAMA_8B["vocab_size"],
        dtype="bfloat16",
        device=f"{option.target}, ahead of time",
        peak_bytes=found["peak_bytes"],
        model="Llama-3.1-8B",
        target=option.target,
        compiler=f"{found['compiler']} {version(found['compiler'])}",
        options=option.trainer | option.model,
        pairs=PAIRS,
        length=LENGTH,
        **{name: found[name] for name in kept},
    )


def show(results: Sequence[rows.Row]) -> str:
    """The table, in GiB of a device."""

    def gib(value: int) -> str:
        return f"{value / 2**30:.2f}"

    lines = []
    for row in results:
        wire = sum(x["wire"] for x in row["collectives"])
        held, temporary = row["held_bytes"], row["temporary_bytes"]
        lines.append(
            (
                row["target"],
                row["implementation"],
                gib(held["optimizer"]),
                gib(sum(held.values())),
                gib(temporary - row["gradient_bytes"]),
                gib(row["peak_bytes"]),
                gib(wire),
            )
        )
    header = ("target", "options", "optimizer", "held", "activations", "peak")
    return rows.table((*header, "received"), lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table and write the rows; 1 where a step does not fit."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.memory_options")
    parser.add_argument("--only", metavar="WORDS", help="options whose name has them")
    parser.add_argument("--show", action="store_true", help="the rows that there are")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker is not None:
        with tempfile.TemporaryDirectory() as folder:
            processes.answer(row_of(OPTIONS[args.worker], Path(folder)))
        return 0
    for index, option in enumerate([] if args.show else OPTIONS):
        if args.only in (None, "") or args.only in option.name:
            run_option(index)
    results = rows.read(PATH)
    print(show(results))
    return 0 if all(row["fits"] for row in results) else 1


def run_option(index: int) -> None:
    """Compile in a process of its own, in which JAX is set up for the target."""
    from engine.planning.targets import parse_target

    option = OPTIONS[index]
    environment = parse_target(option.target).environment
    words = ["--worker", str(index)]
    row = processes.ask("bench.step.memory_options", words, environment)
    order = [(x.target, x.name) for x in OPTIONS]

    def place(row: rows.Row) -> int:
        return order.index((row["target"], row["implementation"]))

    others = [x for x in rows.read(PATH) if place(x) != index]
    rows.write_to(PATH, sorted([*others, row], key=place))
    print(show([row]).splitlines()[-1], f"{row['compile_s']} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
