"""A table of steps compiled ahead of time for absent devices, one row an option.

For `bench.step.memory_options` and `bench.step.overlap`. The engine's own step of
Llama-3.1-8B (policy, reference, backward, AdamW; parameters float32, products bfloat16,
every device on the fsdp axis), pairs of 2,048 tokens, half of them scored, compiled as
`dpo plan` does; nothing runs.

Rows are written as they come, those of other options stay.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import processes, rows
from bench.step.plan_cases import LLAMA_8B, run_of, write_config

LENGTH = 2048


@dataclass(frozen=True, kw_only=True)
class Option:
    """A run with some options that are not at their defaults."""

    name: str
    target: str
    pairs: int = 2  # at once on each device
    trainer: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a benchmark compiles, and where it keeps what it finds."""

    module: str
    path: Path
    options: Sequence[Option]
    show: Callable[[Sequence[rows.Row]], str]

    def main(self, argv: list[str] | None) -> int:
        """Print the table and write the rows; 1 where a step does not fit."""
        parser = argparse.ArgumentParser(prog=f"python -m {self.module}")
        parser.add_argument("--only", metavar="WORDS", help="options that are named so")
        parser.add_argument("--target", help="those of one target")
        parser.add_argument("--show", action="store_true", help="the rows there are")
        parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
        args = parser.parse_args(argv)
        if args.worker is not None:
            with tempfile.TemporaryDirectory() as folder:
                processes.answer(row_of(self.options[args.worker], Path(folder)))
            return 0
        for index, option in enumerate([] if args.show else self.options):
            named = args.only in (None, "") or args.only in option.name
            if named and args.target in (None, option.target):
                self._compile(index)
        results = rows.read(self.path)
        print(self.show(results))
        return 0 if all(row["fits"] for row in results) else 1

    def _compile(self, index: int) -> None:
        """In a process of its own, in which JAX is set up for the target."""
        from engine.planning.targets import parse_target

        environment = parse_target(self.options[index].target).environment
        row = processes.ask(self.module, ["--worker", str(index)], environment)
        order = [(x.target, x.name) for x in self.options]

        def place(row: rows.Row) -> int:
            return order.index((row["target"], row["implementation"]))

        others = rows.others(self.path, row, "target", "implementation")
        rows.write_to(self.path, sorted([*others, row], key=place))
        print(self.show([row]).splitlines()[-1], f"{row['compile_s']} s", flush=True)


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
        option.pairs * target.count,
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
        pairs=option.pairs,
        length=LENGTH,
        roofline=found["seconds"],
        **{name: found[name] for name in kept},
    )


def gib(value: int) -> str:
    """Bytes in GiB."""
    return f"{value / 2**30:.2f}"
