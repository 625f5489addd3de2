"""Long rows on devices that are not here: spread over them, and each on one.

    python -m bench.step.plan_sequence [--only h200:8] [--show]

The step of `bench.step.plan` for rows of 65,536 and more tokens, of which half are
scored, with `sharding.sequence` and without; all devices share the parameters either
way. A row is a compilation; its `pairs` are those of the `sequence` devices that have
rows together. What fits is said by `fits`; nothing runs.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import processes, rows
from bench.step.plan import SIDES, account_of, row_of
from bench.step.plan_cases import LONG_CASES, Case

PATH = rows.RESULTS / "plan_sequence.json"


def answer_case(index: int) -> None:
    """The row of a case, in the right process."""
    case = LONG_CASES[index]
    (pairs,) = case.ours
    with tempfile.TemporaryDirectory() as folder:
        found = account_of(case, SIDES[0], pairs, Path(folder))
    processes.answer(row_of(case, SIDES[0], {pairs: found}))


def run_case(index: int, case: Case) -> None:
    """Compile a case in a process of its own, and write its row."""
    from engine.planning.targets import parse_target

    environment = parse_target(case.target).environment
    words = ["--worker", str(index)]
    for row in processes.ask_as_it_goes("bench.step.plan_sequence", words, environment):
        kept = rows.others(PATH, row, "model", "target", "length", "sequence")
        rows.write_to(PATH, [*kept, row])
        print(show([row]).splitlines()[-1], f"{row['compile_s']} s", flush=True)


def show(results: Sequence[rows.Row]) -> str:
    """The table, in GiB."""
    lines = []
    for row in results:
        peak = row["peak_bytes"]
        lines.append(
            (
                *(row["model"], row["target"], row["length"], row["sequence"]),
                row["pairs"],
                f"{sum(row['held_bytes'].values()) / 2**30:.1f}",
                f"{row['gradient_bytes'] / 2**30:.1f}",
                "?" if peak is None else f"{peak / 2**30:.1f}",
                f"{row['capacity_bytes'] / 2**30:.1f}",
                "yes" if row["fits"] else "no",
            )
        )
    header = ("model", "target", "length", "sequence", "pairs", "held GiB")
    header += ("gradients", "peak GiB", "of", "fits")
    return rows.table(header, lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table and write the rows; 1 where one that is spread does not fit."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.plan_sequence")
    parser.add_argument("--only", metavar="TARGET", help="of this target: h200, v5p")
    parser.add_argument("--show", action="store_true", help="the rows that there are")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker is not None:
        answer_case(args.worker)
        return 0
    for index, case in enumerate(LONG_CASES):
        if not args.show and case.target.startswith(args.only or ""):
            run_case(index, case)
    results = rows.read(PATH)
    print(show(results))
    return 0 if all(row["fits"] for row in results if row["sequence"] > 1) else 1


if __name__ == "__main__":
    sys.exit(main())
