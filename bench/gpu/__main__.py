"""Everything on one GPU, within 8 minutes.

    python -m bench.gpu [--rehearse] [--sections NAME,...] [--limit SECONDS]

Correctness, speed beside the bare product, plain JAX and torch, a whole DPO step, a
memory checker, and the plots. Exits with 1 where a result is wrong; a goal that is
missed is reported. `--rehearse` runs the same code on a CPU at tiny shapes.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from bench import processes, rows
from bench.gpu import shared, sizes, summary
from bench.gpu.supervisor import Run, run_section

PROBE_S = 60.0
PLOT_S = 6.0  # kept back for the plots


def probe(run: Run) -> str | None:
    """The device's name, by a process of its own; None without a GPU."""
    platform, kind = processes.first_device(run.environment("probe"), PROBE_S)
    return kind if platform == ("cpu" if run.rehearse else "gpu") else None


class Results:
    """The rows of this run, and those that earlier ones left of other sections."""

    def __init__(self, path: Path, sections: list[str]):
        self.path = path
        self.kept = [
            row for row in rows.read(path) if row.get("section") not in sections
        ]
        self.new: list[rows.Row] = []

    def take(self, row: rows.Row) -> None:
        """Write it at once: what comes later may not come."""
        self.new.append(row)
        rows.write_to(self.path, [*self.kept, *self.new])
        print(summary.line(row), flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny shapes")
    parser.add_argument(
        "--sections",
        default=",".join(sizes.BUDGETS),
        help="some of them; the others' rows are kept (%(default)s)",
    )
    parser.add_argument("--limit", type=float, default=sizes.LIMIT_S, help="seconds")
    parser.add_argument("--output", type=Path, help="default: bench/results/gpu.json")
    parser.add_argument("--plots", type=Path, help="default: docs/")
    parser.add_argument(
        "--torch-python", default=sys.executable, help="one that has torch"
    )
    args = parser.parse_args(argv)
    args.sections = [name for name in args.sections.split(",") if name]
    for name in args.sections:
        if name not in sizes.BUDGETS:
            parser.error(f"no section {name!r}; there are {', '.join(sizes.BUDGETS)}")
    return args


def run_sections(run: Run, sections: list[str], end: float) -> None:
    """One after the other; what one leaves of its time is the next ones'."""
    planned = sum(sizes.BUDGETS[name] for name in sections)
    # All of the time is given out, also where only some sections are asked for.
    spare = end - time.time() - planned
    for name in sections:
        start = time.time()
        seconds = min(sizes.BUDGETS[name] + max(0.0, spare), end - start)
        if seconds <= 0:
            run.log(f"  {name}: no time left")
            continue
        run_section(run, name, seconds)
        spare += sizes.BUDGETS[name] - (time.time() - start)


def draw(output: Path, plots: Path) -> None:
    """Draw in a process of its own, too: a plot that fails costs no results."""
    words = processes.command("bench.gpu.plot", [str(output), str(plots)])
    subprocess.run(words, cwd=rows.ROOT, check=False)


def main(argv: list[str] | None = None) -> int:
    """Run the sections, draw, and say what was met and what was missed."""
    args = parse(argv)
    end = time.time() + args.limit - PLOT_S
    work = shared.directory()
    output = args.output or (
        work / "gpu.json" if args.rehearse else rows.RESULTS / "gpu.json"
    )
    plots = args.plots or (work if args.rehearse else rows.ROOT / "docs")
    results = Results(output, args.sections)
    plan = sizes.REHEARSAL if args.rehearse else sizes.REAL
    run = Run(
        work=work,
        rehearse=args.rehearse,
        torch_python=args.torch_python,
        hang_s=plan.hang_s,
        take=results.take,
    )
    device = probe(run)
    if device is None:
        print(
            "no GPU that JAX can use was found; `python -m bench.gpu --rehearse` runs "
            "the same on a CPU, at tiny shapes"
        )
        return 2
    run.device = rows.cpu_name() if args.rehearse else device
    print(f"{run.device}; logs in {work}", flush=True)
    try:
        run_sections(run, args.sections, end)
    finally:
        for file in work.glob("*.npy"):
            file.unlink()
    everything = [*results.kept, *results.new]
    print("\n" + summary.report(everything))
    print("wrote", output)
    draw(output, plots)
    return 0 if summary.correct(results.new, args.sections) else 1


if __name__ == "__main__":
    sys.exit(main())
