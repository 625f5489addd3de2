"""Predicts a Pallas TPU kernel's speed from the TPU compiler's final schedule.

    python -m bench.tpu.schedule --program file.py:build --tpu v6e \
        --T 4096 --D 4096 --V 128256 [--option block_v=512,1024] [--blocks]
    python -m bench.tpu.schedule --reproduce [--quick]
    python -m bench.tpu.schedule --compare [--quick] [--tpu NAME]... \
        [--program forward]...

Nothing runs on a TPU: a program (see `bench.tpu.programs`) is compiled ahead of time,
its schedule is followed bundle by bundle (`bench.tpu.simulator`), and the cycles are
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
import sys
from collections.abc import Sequence
from typing import Any

from bench import rows
from bench.tpu.bundles import ScheduleError
from bench.tpu.chips import CHIPS
from bench.tpu.compile import Job
from bench.tpu.predict import predict
from bench.tpu.programs import ProgramError
from bench.tpu.report import NOTE, show, show_blocks


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
        prog="python -m bench.tpu.schedule", description=NOTE
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
            from bench.tpu.compare import compare
            from bench.tpu.peers import reproduce

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
