"""tokamax's kernels under `bench.tpu.schedule`: against its own times, and beside ours.

tokamax 0.0.17 ships autotuning data: device times of its kernels at the configuration
that was fastest. `reproduce` predicts those times; `bench.tpu.compare` sets our kernels
beside its.
"""

import sys
from collections.abc import Iterable

from bench import rows
from bench.tpu.bundles import ScheduleError
from bench.tpu.compile import Job
from bench.tpu.predict import predict, python_for
from bench.tpu.programs import ProgramError
from bench.tpu.report import NOTE

# What the prediction is checked on: (T, D, V) by TPU. Some cut D into blocks, some not.
FORWARD = {
    "v6e": (
        (4096, 4096, 128256),
        (1024, 2560, 262144),
        (2048, 3840, 262144),
        (4096, 7168, 128256),
        (2048, 2880, 201088),
        (4096, 5120, 151936),
        (1024, 5120, 151936),
    ),
    "v5p": (
        (4096, 4096, 128256),
        (4096, 2560, 262144),
        (4096, 7168, 128256),
        (4096, 2880, 201088),
        (4096, 5120, 151936),
    ),
    "7x": (
        (4096, 4096, 128256),
        (1024, 2560, 262144),
        (2048, 3840, 262144),
        (8192, 7168, 128256),
        (2048, 2880, 201088),
        (4096, 5120, 151936),
        (1024, 5120, 151936),
    ),
}
BACKWARD = {
    "v6e": (
        (4096, 4096, 128256),
        (1024, 2560, 262144),
        (2048, 2880, 201088),
        (4096, 5120, 151936),
    ),
    "v5p": (
        (4096, 4096, 128256),
        (2048, 3840, 262144),
        (4096, 2880, 201088),
        (1024, 2560, 262144),
    ),
    "7x": (
        (4096, 4096, 128256),
        (2048, 2560, 262144),
        (4096, 7168, 128256),
        (1024, 5120, 151936),
    ),
}


def predictions(jobs: Iterable[Job]) -> list[rows.Row]:
    """A row for each job that can be predicted; the others are named on stderr."""
    results = []
    for job in jobs:
        try:
            row, _ = predict(job)
        except (ProgramError, ScheduleError) as error:
            shape = f"T={job.T} D={job.D} V={job.V}"
            print(f"{job.program} {job.generation} {shape}: {error}", file=sys.stderr)
            continue
        for name, reason in row["not_timed"].items():
            print(f"not timed: {name}: {reason}", file=sys.stderr)
        results.append(row)
    return results


def _errors(results: list[rows.Row]) -> str:
    """Prediction beside publication."""
    header = ("TPU", "program", "T", "D", "V", "blocks of T, D, V", "buffers", "jax")
    header += ("published ms", "predicted ms", "predicted / published", "wait %")
    cells = []
    for row in results:
        config = row["config"]
        blocks = [config[f"{x}_block_size"] for x in "bhv"]
        published = row["published_ms"]
        cells.append(
            (
                row["device"].split(",")[0].removeprefix("TPU "),
                *(row[x] for x in ("implementation", "T", "D", "V")),
                " x ".join(map(str, blocks)) + " (D whole)" * (blocks[1] == row["D"]),
                *(config["buffer_count"], row["jax"], published, row["ms"]),
                *(f"{row['ms'] / published:.3f}", row["wait_pct"]),
            )
        )
    return rows.table(header, cells)


def reproduce(quick: bool) -> int:
    """tokamax's published times and their predictions; 1 where a forward is off.

    Off is more than 12%, or 5% where D is one block.
    """
    python_for("tokamax")  # one line where it is not there
    jobs = [
        Job(program=program, generation=tpu, T=T, D=D, V=V)
        for program, table in (("tokamax", FORWARD), ("tokamax-backward", BACKWARD))
        for tpu, shapes in table.items()
        for T, D, V in shapes[: 1 if quick else None]
    ]
    results = [row for row in predictions(jobs) if "published_ms" in row]
    print(_errors(results))
    print(f"({NOTE})")
    if not quick:
        path = rows.write("tpu_schedule_tokamax", results)
        print("wrote", path.relative_to(rows.ROOT))
    off = [row for row in results if not _close(row)]
    return 1 if off or len(results) < len(jobs) else 0


def _close(row: rows.Row) -> bool:
    if row["implementation"] != "tokamax":
        return True
    whole = row["config"]["h_block_size"] == row["D"]
    return abs(row["ms"] / row["published_ms"] - 1) <= (0.05 if whole else 0.12)
