"""Block sizes of splash attention by the instrument, beside what the plain tiles take.

    python -m bench.tpu.splash_blocks [--tpu v6e]... [--part kernels|attention]...
        [--kernel dq]...

One row of tokens of Llama-3.1-8B's attention (32 query heads, 8 kv heads of 128),
bfloat16, causal, on one device: each kernel in each candidate's blocks, then the tiles.
At the longer length only those candidates are tried that were within `WITHIN` of the
best at the shorter one, and the engine's own. Nothing runs: every time is predicted
(`bench.tpu.schedule`; `bench.tpu.tiles` says how the tiles' is).

The first table has each kernel's best blocks beside squares of 512 and the engine's own
(`engine.models.attention.splash.block_sizes`); `lost` is what these take beyond the
best. The second one has attention's time, forward and backward. A candidate that the
compiler refuses is a row with `error`. Exits with 1 where that is one of the engine's,
or where the tiles have no row. Rows: results/splash_blocks.json.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from bench import rows
from bench.tpu import tiles
from bench.tpu.bundles import ScheduleError
from bench.tpu.compile import Job
from bench.tpu.predict import predict, row_of
from bench.tpu.programs import ProgramError
from bench.tpu.report import NOTE
from bench.tpu.splash import ENGINES

NAME = "splash_blocks"
TPUS = ("v6e", "v5e", "7x")
LENGTHS = (2048, 8192)
HEADS = 32 * 128  # N H
BLOCKS = (512, 1024, 2048)
COMPUTE = (512, 1024)
WITHIN = 1.15
KERNELS = (*ENGINES, "fused")
PLAIN = ("tiles-forward", "tiles-backward")
Blocks = tuple[int, ...]  # of queries, of keys, and of those computed at a time


def candidates(which: str) -> list[Blocks]:
    """What is tried of a kernel at the shorter length."""
    pairs = [(q, kv) for q in BLOCKS for kv in BLOCKS if max(q, kv) <= 2 * min(q, kv)]
    if which == "dq":
        return [(256, 256), *pairs]
    if which == "fused":
        # Smaller blocks of keys: as many more parts of dq, 64 MiB each at S=8192.
        pairs = [(q, kv) for q, kv in pairs if kv > BLOCKS[0]]
    several = [(q, kv, c) for q, kv in pairs for c in COMPUTE if c <= kv]
    return [(256, 256, 256), *several]


def own(which: str, length: int) -> Blocks:
    """The engine's: of the fused kernel those that it has for dk and dv."""
    from engine.models.attention import splash

    sizes = splash.block_sizes(length, length, length)
    found: tuple[Any, ...] = {
        "forward": (sizes.block_q, sizes.block_kv, sizes.block_kv_compute),
        "dq": (sizes.block_q_dq, sizes.block_kv_dq),
    }.get(which, (sizes.block_q_dkv, sizes.block_kv_dkv, sizes.block_kv_dkv_compute))
    return found


def square(which: str) -> Blocks:
    """512 throughout: what the engine had before."""
    return (512, 512) if which == "dq" else (512, 512, 512)


def blocks_of(row: rows.Row) -> Blocks:
    """A row's candidate."""
    options = row["options"]
    return tuple(options[x] for x in ("q", "kv", "compute") if x in options)


def total(row: rows.Row) -> float:
    """Milliseconds, with what XLA expects of operations that were not followed."""
    return row["ms"] + row.get("not_timed_ms", 0)


def shortlist(results: Sequence[rows.Row], which: str, length: int) -> list[Blocks]:
    """What is tried of a kernel, given the rows of its shorter lengths on this TPU."""
    mine = [x for x in results if x["implementation"] == f"splash-{which}"]
    timed = [x for x in mine if x["T"] < length and x["ms"] is not None]
    if not timed:
        return sorted({*candidates(which), own(which, length)})
    limit = WITHIN * min(map(total, timed))
    near = {blocks_of(x) for x in timed if total(x) <= limit}
    return sorted(near | {own(which, length), square(which)})


def predicted(job: Job) -> rows.Row:
    """The row of a program, which has `error` where there is no prediction."""
    try:
        if job.program in PLAIN:
            return tiles.predict(job)
        return predict(job)[0]
    except (ProgramError, ScheduleError) as error:
        return row_of(job, error=str(error)[:300])


def _job(tpu: str, program: str, length: int, options: dict[str, Any]) -> Job:
    shape: dict[str, Any] = {"T": length, "D": HEADS, "V": 1}
    return Job(program=program, generation=tpu, options=options, **shape)


def kernels(tpu: str, chosen: Sequence[str]) -> Iterator[rows.Row]:
    """Kernels of one TPU in each candidate's blocks: rows as they come."""
    results: list[rows.Row] = []
    for length in LENGTHS:
        for which in chosen:
            for blocks in shortlist(results, which, length):
                names = zip(("q", "kv", "compute"), blocks, strict=False)
                job = _job(tpu, f"splash-{which}", length, dict(names))
                results.append(predicted(job))
                yield results[-1]


def attention(tpu: str, chosen: Sequence[str]) -> Iterator[rows.Row]:
    """All of attention in the engine's own blocks, and in plain tiles."""
    del chosen  # all of it
    for length in LENGTHS:
        for program in PLAIN:
            yield predicted(_job(tpu, program, length, {}))
        for which in ENGINES:
            yield predicted(_job(tpu, f"splash-{which}", length, {"whole": 1}))


PARTS = {"kernels": kernels, "attention": attention}


def _kernel(row: rows.Row) -> str:
    return row["implementation"].partition("-")[2]


def part_of(row: rows.Row) -> str:
    """Which of the parts a row is of."""
    whole = row["implementation"] in PLAIN or "whole" in row["options"]
    return "attention" if whole else "kernels"


def _of(results: Sequence[rows.Row], tpu: str, length: int, program: str) -> list:
    """Its rows that have a time, the fastest first; of the kernel alone."""
    device = f"TPU {tpu}, ahead of time"
    key = device, length, program
    found = [x for x in results if (x["device"], x["T"], x["implementation"]) == key]
    found = [x for x in found if part_of(x) == "kernels"]
    return sorted((x for x in found if x["ms"] is not None), key=total)


def _time(found: Sequence[rows.Row], blocks: Blocks) -> float | None:
    return next((total(x) for x in found if blocks_of(x) == blocks), None)


def _backward(dq: rows.Row | None, dkv: rows.Row | None) -> float | None:
    """Of both kernels; what XLA does around them is done once."""
    return None if dq is None or dkv is None else dq["kernel_ms"] + total(dkv)


def _text(time: float | None) -> str:
    return "" if time is None else f"{time:.3g}"


def show_kernels(results: Sequence[rows.Row]) -> str:
    """Each kernel's best blocks beside the engine's own."""
    cells = []
    for tpu, length, which in itertools.product(TPUS, LENGTHS, KERNELS):
        found = _of(results, tpu, length, f"splash-{which}")
        if not found:
            continue
        best, mine = total(found[0]), _time(found, own(which, length))
        lost = "" if mine is None else f"{100 * (mine / best - 1):.0f}%"
        cells.append(
            (
                *(tpu, length, which, _text(_time(found, square(which)))),
                *("/".join(map(str, blocks_of(found[0]))), _text(best)),
                *("/".join(map(str, own(which, length))), _text(mine), lost),
            )
        )
    header = ("TPU", "S", "kernel", "512 ms", "best blocks", "best ms")
    return rows.table((*header, "engine's blocks", "ms", "lost"), cells)


def show_attention(results: Sequence[rows.Row]) -> str:
    """Attention in the engine's blocks, and in plain tiles."""
    found = {
        (x["device"], x["T"], x["implementation"]): x
        for x in results
        if part_of(x) == "attention" and x["ms"] is not None
    }
    cells = []
    for tpu, length in itertools.product(TPUS, LENGTHS):
        key = f"TPU {tpu}, ahead of time", length
        of = {x: found.get((*key, f"splash-{x}")) for x in ENGINES}
        for phase in ("forward", "backward"):
            ours = _backward(of["dq"], of["dkv"])
            if phase == "forward":
                ours = total(of["forward"]) if of["forward"] else None
            plain = found.get((*key, f"tiles-{phase}"))
            if ours is None or plain is None:
                continue
            tile = plain["ms"], plain["estimate_ms"]
            ratios = " to ".join(f"{x / ours:.1f}" for x in tile)
            cells.append((tpu, length, phase, *map(_text, (ours, *tile)), ratios))
    header = ("TPU", "S", "", "splash ms", "tiles' schedule ms")
    return rows.table((*header, "tiles by XLA ms", "times as fast"), cells)


def main(argv: list[str] | None = None) -> int:
    """Print the tables and write the rows; 1 where a row that has to be is not."""
    parser = argparse.ArgumentParser(prog="python -m bench.tpu.splash_blocks")
    parser.add_argument("--tpu", action="append", choices=TPUS)
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--kernel", action="append", choices=KERNELS)
    args = parser.parse_args(argv)
    path = rows.RESULTS / f"{NAME}.json"
    chosen, parts = args.tpu or TPUS, args.part or PARTS
    which = args.kernel or KERNELS
    devices = [f"TPU {tpu}, ahead of time" for tpu in chosen]

    def kept(row: rows.Row) -> bool:
        if row["device"] not in devices or part_of(row) not in parts:
            return True
        return part_of(row) == "kernels" and _kernel(row) not in which

    results = [row for row in rows.read(path) if kept(row)]
    failed = False
    for tpu, part in itertools.product(chosen, parts):
        for row in PARTS[part](tpu, which):
            results.append(row)
            mine = own(_kernel(row), row["T"])
            needed = part == "attention" or blocks_of(row) == mine
            failed |= needed and "error" in row
            rows.write_to(path, results)
            place = [tpu, row["T"], row["implementation"], row["options"]]
            print(*place, row["ms"], row.get("error", ""), flush=True)
    print(f"{show_kernels(results)}\n\n{show_attention(results)}\n({NOTE})")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
