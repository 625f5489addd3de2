"""Our kernels and tokamax's at the shapes people ask about, on every TPU.

A run writes each row to results/tpu_schedule_compare.json as it comes. Half of the rows
being padding is a row of its own: the same program, told that fewer rows are valid.
"""

import os
import sys
from collections.abc import Iterator, Sequence

from bench import rows
from bench.tpu.bundles import ScheduleError
from bench.tpu.compile import Job, compile_elsewhere
from bench.tpu.ours import VALID_ROWS
from bench.tpu.peers import predictions
from bench.tpu.predict import follow, python_for
from bench.tpu.programs import PROGRAMS, ProgramError
from bench.tpu.report import NOTE, show

NAME = "tpu_schedule_compare"
SHAPES = (
    (4096, 4096, 128256),
    (8192, 2304, 256000),
    (4096, 4096, 151936),
    (2048, 8192, 128256),
)
TPUS = ("v5e", "v6e", "v5p", "7x")
OURS = {"forward": "tokamax", "backward": "tokamax-backward"}  # and what it is beside
HALF_GOAL = 0.55  # of the time of all rows, where half are padding


def _ours(job: Job) -> Iterator[rows.Row]:
    """With every row valid, and with half of them; a failure is a line on stderr."""
    place = f"{job.program} {job.generation} T={job.T} D={job.D} V={job.V}"
    try:
        compiled = compile_elsewhere(job, python_for(job.program))
        for valid in (job.T, job.T // 2):
            row, _ = follow(job, compiled, {VALID_ROWS: [valid]})
            if valid < job.T:
                # The useful work: what the compiled program counts is that of all rows.
                share = valid / job.T
                for key in ("tflops", "pct_peak"):
                    row[key] = row[key] and float(f"{share * row[key]:.4g}")
                executed = row["matmul_flop_per_useful"]
                row["matmul_flop_per_useful"] = executed and round(executed / share, 4)
                row |= {"options": {"valid": valid}, "valid": valid}
            yield row
    except (ProgramError, ScheduleError) as error:
        print(f"{place}: {error}", file=sys.stderr, flush=True)


def _key(row: rows.Row) -> tuple:
    """Of a line of the comparison: TPU and shape."""
    return row["device"].split(",")[0].removeprefix("TPU "), *(row[x] for x in "TDV")


def _is_half(row: rows.Row) -> bool:
    return row.get("valid", row["T"]) < row["T"]


def ratios(results: Sequence[rows.Row]) -> str:
    """Ours beside tokamax's; half the rows beside all of them."""
    full = {
        (row["implementation"], *_key(row)): row for row in results if not _is_half(row)
    }
    half = {
        (row["implementation"], *_key(row)): row for row in results if _is_half(row)
    }
    cells = []
    for (name, *key), row in full.items():
        if name not in OURS:
            continue
        peer, padded = full.get((OURS[name], *key)), half.get((name, *key))
        share = padded["ms"] / row["ms"] if padded else None
        cells.append(
            (
                *(name, *key, row["ms"], row["pct_peak"]),
                peer["ms"] if peer else "",
                f"{peer['ms'] / row['ms']:.2f}" if peer else "",
                "" if share is None else f"{share:.3f}",
                "" if share is None else "yes" if share <= HALF_GOAL else "NO",
            )
        )
    header = ("program", "TPU", "T", "D", "V", "ms", "% peak", "tokamax ms")
    header += ("times as fast", "half / all rows", f"<= {HALF_GOAL}")
    return rows.table(header, cells)


def compare(quick: bool, tpus: Sequence[str] = (), programs: Sequence[str] = ()) -> int:
    """Every registered program at each shape on each TPU; 1 where one has no row.

    Rows of TPUs and programs that are not asked for are those of an earlier run, and so
    are tokamax's where TOKAMAX_PYTHON is not set.

    Raises:
        ProgramError: a program that is not registered, or that needs tokamax.
    """
    path = rows.RESULTS / f"{NAME}.json"
    with_tokamax = "TOKAMAX_PYTHON" in os.environ
    fresh = [name for name in PROGRAMS if name in OURS or with_tokamax]
    if unknown := set(programs) - set(fresh):
        raise ProgramError(f"--program {min(unknown)} is none of {', '.join(fresh)}")
    fresh = [name for name in fresh if not programs or name in programs]
    shapes, tpus = SHAPES[: 1 if quick else None], tpus or TPUS
    kept = [
        row
        for row in rows.read(path)
        if row["implementation"] not in fresh or _key(row)[0] not in tpus
    ]
    kept = [row for row in kept if _key(row)[1:] in shapes]
    results: list[rows.Row] = []
    jobs = [
        Job(program=program, generation=tpu, T=T, D=D, V=V)
        for T, D, V in shapes
        for tpu in tpus
        for program in fresh
    ]
    missing = 0
    for job in jobs:
        found = list(_ours(job) if job.program in OURS else predictions([job]))
        results += found
        missing += not found
        if not quick:
            rows.write(NAME, [*results, *kept])
    everything = [*results, *kept]
    print(show(everything))
    print(f"\n{ratios(everything)}\n({NOTE})")
    if not quick:
        print("wrote", path.relative_to(rows.ROOT))
    return 1 if missing else 0
