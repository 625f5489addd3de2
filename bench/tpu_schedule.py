"""Predicts a Pallas TPU kernel's speed from the TPU compiler's final schedule.

    python -m bench.tpu_schedule --program file.py:build --tpu v6e \
        --T 4096 --D 4096 --V 128256 [--option block_v=512,1024] [--blocks]
    python -m bench.tpu_schedule --reproduce [--quick]
    python -m bench.tpu_schedule --compare [--quick] [--tpu NAME]... \
        [--program forward]...

Nothing runs on a TPU: a program (see `bench.tpu_programs`) is compiled ahead of time,
its schedule is followed bundle by bundle (`bench.tpu_simulator`), and the cycles are
summed. An option with several values is swept over. `--reproduce` sets the prediction
beside device times that tokamax publishes; `--compare` sets our kernels beside
tokamax's. tokamax needs an environment of its own: `TOKAMAX_PYTHON=/path/to/bin/python`
(without it `--compare` keeps the rows that an earlier run has). Its backward needs JAX
0.12 to buffer as it did for the published times (on 0.11.2 it waits for every
transfer): `TOKAMAX_BACKWARD_PYTHON` may name another environment for it.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from bench import rows
from bench.tpu_bundles import ScheduleError
from bench.tpu_chips import CHIPS
from bench.tpu_compile import Compiled, Job, compile_elsewhere
from bench.tpu_model import Operation, operations
from bench.tpu_programs import ProgramError
from bench.tpu_report import NOTE, show, show_blocks


def python_for(program: str, chosen: str | None = None) -> str:
    """The Python that a program is built with.

    Raises:
        ProgramError: tokamax's is not given.
    """
    if chosen:
        if not shutil.which(chosen):
            raise ProgramError(f"no Python at {chosen}")
        return chosen
    if not program.startswith("tokamax"):
        return sys.executable
    path = os.environ.get("TOKAMAX_PYTHON", "")
    if program == "tokamax-backward":
        path = os.environ.get("TOKAMAX_BACKWARD_PYTHON", path)
    if not path or not shutil.which(path):
        raise ProgramError(
            f"{program} needs tokamax: set TOKAMAX_PYTHON to the Python of an "
            "environment with `pip install tokamax==0.0.17`"
        )
    return path


def predict(
    job: Job,
    python: str | None = None,
    scalars: dict[int, list[int]] | None = None,
) -> tuple[rows.Row, list[Operation]]:
    """A row for a program, and its operations.

    Raises:
        ProgramError, ScheduleError: one line says why there is no prediction.
    """
    return follow(job, compile_elsewhere(job, python_for(job.program, python)), scalars)


def follow(
    job: Job, compiled: Compiled, scalars: dict[int, list[int]] | None = None
) -> tuple[rows.Row, list[Operation]]:
    """As `predict`, of what is compiled already."""
    facts, chip = compiled.facts, CHIPS[job.generation]
    known = {int(k): v for k, v in facts["scalars"].items()} | (scalars or {})
    done, skipped = operations(compiled.schedules, chip, known, facts["trips"])
    kernels = [one for one in done if one.pallas]
    others = [one for one in done if not one.pallas]
    executed = sum(one.calls * one.matmul_flop for one in done)
    useful = facts["flops"] or executed
    kernel_s = sum(one.calls * one.seconds for one in kernels)
    other_s = sum(one.calls * one.seconds for one in others)
    # The kernel with the most to do is the one that the columns describe.
    main = max(kernels, key=lambda one: one.calls * one.seconds)
    row = rows.row(
        "TPU schedule",
        job.program,
        T=job.T,
        D=job.D,
        V=job.V,
        dtype=job.dtype,
        device=f"TPU {job.generation}, ahead of time",
        seconds=kernel_s + other_s,
        flops=useful or None,
        peak_tflops=chip.peak_tflops,
        what=NOTE,
        compiler=facts["compiler"],
        options=job.options,
        kernel_ms=round(1e3 * kernel_s, 4),
        other_ms=round(1e3 * other_s, 4),
        not_timed=skipped,
        binds=main.binds,
        steps=main.steps,
        cycles_per_step=round(main.run.cycles / max(main.steps, 1)),
        bytes_per_step=round(main.hbm_bytes / len(main.runs) / max(main.steps, 1)),
        wait_pct=round(100 * main.run.wait / main.run.cycles, 2),
        hbm_ms=round(1e3 * main.transfer_cycles / chip.hertz, 4),
        matmul_flop_per_useful=round(executed / useful, 4) if useful else None,
        spills=sum(b.spills for b in main.run.blocks),
        temp_bytes=facts["temp_bytes"],
        argument_bytes=facts["argument_bytes"],
        output_bytes=facts["output_bytes"],
        **facts["notes"],
    )
    row["jax"] = facts["jax"]
    return row, done


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def option_sets(words: Sequence[str]) -> list[dict[str, Any]]:
    """`a=1,2 b=x` -> every combination.

    Raises:
        ProgramError: a word without `=`.
    """
    names, choices = [], []
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or not values:
            raise ProgramError(f"--option {word!r} is not name=value[,value...]")
        names.append(name)
        whole = _value(values)
        many = isinstance(whole, str) and "," in values
        choices.append([_value(x) for x in values.split(",")] if many else [whole])
    return [
        dict(zip(names, values, strict=True)) for values in itertools.product(*choices)
    ]


def scalar_values(words: Sequence[str]) -> dict[int, list[int]]:
    """`0=2048 2=0,5` -> operand of the kernel: its int32 values.

    Raises:
        ProgramError: anything else.
    """
    try:
        pairs = [word.split("=") for word in words]
        return {int(a): [int(x) for x in b.split(",")] for a, b in pairs}
    except ValueError:
        raise ProgramError(f"--scalar {words} is not operand=int[,int...]") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.tpu_schedule", description=NOTE
    )
    parser.add_argument("--program", action="append", default=[])
    parser.add_argument("--tpu", action="append", choices=CHIPS, default=[])
    for name in "TDV":
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUES")
    parser.add_argument(
        "--scalar",
        action="append",
        default=[],
        metavar="OPERAND=VALUES",
        help="what an operand of the kernel in scalar memory holds",
    )
    parser.add_argument("--blocks", action="store_true", help="cycles by region")
    parser.add_argument("--python", help="to build the program with")
    parser.add_argument(
        "--save", metavar="NAME", help="rows to bench/results/NAME.json"
    )
    parser.add_argument("--reproduce", action="store_true")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer points; no rows")
    return parser


def run_programs(args: argparse.Namespace) -> list[rows.Row]:
    """Every program, TPU and set of options; a failure is one line on stderr."""
    results: list[rows.Row] = []
    scalars = scalar_values(args.scalar)
    sets = option_sets(args.option)
    for program, tpu, options in itertools.product(args.program, args.tpu, sets):
        shape = {"T": args.T, "D": args.D, "V": args.V}
        job = Job(
            program=program,
            generation=tpu,
            **shape,
            dtype=args.dtype,
            options=options,
        )
        try:
            row, done = predict(job, args.python, scalars)
        except (ProgramError, ScheduleError) as problem:
            print(f"{program} {tpu} {options}: {problem}", file=sys.stderr)
            continue
        results.append(row)
        if args.blocks:
            print(show_blocks(done), "\n")
        for name, reason in row["not_timed"].items():
            print(f"not timed: {name}: {reason}", file=sys.stderr)
    return results


def main(argv: list[str] | None = None) -> int:
    """Print predictions; 2 and one line where there is none."""
    args = _parser().parse_args(argv)
    try:
        if args.reproduce or args.compare:
            from bench.tpu_compare import compare
            from bench.tpu_peers import reproduce

            if args.reproduce:
                return reproduce(args.quick)
            return compare(args.quick, args.tpu, args.program)
        missing = [n for n in ("program", "tpu", "T", "D", "V") if not vars(args)[n]]
        if missing:
            raise ProgramError("say --" + " --".join(missing))
        results = run_programs(args)
        if not results:
            return 2
    except (ProgramError, ScheduleError) as error:
        print(error, file=sys.stderr)
        return 2
    print(show(results))
    print(f"({NOTE})")
    if args.save:
        print("wrote", rows.write(args.save, results).relative_to(rows.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
