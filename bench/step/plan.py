"""How large a batch fits, with our head and with plain JAX's: models on absent devices.

    python -m bench.step.plan [--only v5e:4x4] [--side "plain JAX"] [--show]

The engine's own step (policy, reference, backward, AdamW; parameters float32, products
bfloat16, remat full, every device on the fsdp axis) for pairs of 2048 tokens of which
half are scored, compiled ahead of time by the target's compiler, as `dpo plan` does;
nothing runs. The other side is the same step with plain JAX's head: float32 logits of
all rows and their log-softmax, over the same shards of the vocabulary.

A row is a side's largest batch that was seen to fit, or the smallest that does not,
where none does:

    pairs           a device
    peak_bytes      of a device: what the step is given and its temporaries
    too_large       the next larger one that was compiled, which does not fit; its peak
                    in over_bytes, where its compiler says how much it would take
    compiled        all that were compiled: pairs a device, peak bytes

Rows are written as they come, those of other targets stay. That a plan's memory is what
a step takes is shown where it can run: `bench.step.plan_check`.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import processes, rows
from bench.step.plan_cases import CASES, Case, plain_head, run_of, write_config

SIDES = ("dpo_kernels", "plain JAX")
RANK = 16


def account_of(case: Case, side: str, pairs: int, folder: Path) -> dict[str, Any]:
    """Compile one step; what `dpo plan --json` writes of it.

    Args:
        pairs: on each device, or on those together that a row is spread over.
    """
    from engine.config.lora import LoraConfig
    from engine.config.run import ShardingConfig
    from engine.planning.account import as_json, take_account
    from engine.planning.devices import devices_of
    from engine.planning.models import model_configs
    from engine.planning.steps import LimitSizes, make_step, sizes_by_limits
    from engine.planning.targets import parse_target

    target = parse_target(case.target)
    run = run_of(
        write_config(case.values, folder),
        pairs * target.count // case.sequence,
        case.length,
        lora=LoraConfig(r=RANK, target_modules="all-linear") if case.lora else None,
        sharding=ShardingConfig(sequence=case.sequence),
    )
    mesh = run.sharding.mesh(devices_of(target))
    sizes = sizes_by_limits(run.trainer, mesh)
    head = contextlib.nullcontext()
    if side != SIDES[0]:  # every row
        shapes = ((case.length, 2 * pairs * case.length),)
        sizes = LimitSizes(steps=sizes.steps, shapes=shapes, grid=sizes.grid)
        head = plain_head()
    with head:
        step = make_step(run, *model_configs(run), mesh, sizes)
        return as_json(take_account(step, target))


def row_of(case: Case, side: str, tried: dict[int, dict[str, Any]]) -> rows.Row:
    """The side's row, of what was compiled."""
    fitting = [pairs for pairs, found in tried.items() if found["fits"]]
    pairs = max(fitting, default=min(tried))
    larger = min((n for n in tried if n > pairs), default=None)
    found, over = tried[pairs], larger and tried[larger]
    return rows.row(
        "DPO step, planned",
        side,
        T=found["scored_capacity"],
        D=case.values["hidden_size"],
        V=case.values["vocab_size"],
        dtype="bfloat16",
        device=f"{case.target}, ahead of time",
        peak_bytes=found["peak_bytes"],
        model=case.name,
        target=case.target,
        compiler=f"{found['compiler']} {version(found['compiler'])}",
        pairs=pairs,
        length=case.length,
        sequence=case.sequence,
        too_large=larger,
        over_bytes=over and over["peak_bytes"],
        compiled={n: x["peak_bytes"] for n, x in sorted(tried.items())},
        rank=RANK if case.lora else None,
        roofline=found["seconds"],
        **{
            name: found[name]
            for name in (
                *("fits", "capacity_bytes", "held_bytes", "gradient_bytes"),
                *("temporary_bytes", "refusal", "flops_total", "memory_bytes_moved"),
                *("collectives", "least_s", "most_s", "tokens_per_step"),
                "compile_s",
            )
        },
    )


def answer_case(index: int, side: str) -> None:
    """Rows of a side of a case, each with one more compiled; in the right process."""
    case, tried = CASES[index], {}
    with tempfile.TemporaryDirectory() as folder:
        for pairs in case.ours if side == SIDES[0] else case.plain:
            tried[pairs] = account_of(case, side, pairs, Path(folder))
            processes.answer(row_of(case, side, tried))


def ratio(ours: rows.Row, plain: rows.Row) -> str:
    """By how much the batch of plain JAX has to be smaller, of those compiled."""
    if not ours["fits"]:
        return "neither was seen to fit"
    least = ours["pairs"] / plain["pairs"]
    if plain["fits"]:
        return f"{least:.3g}"
    return f"more than {least:.3g}" if least >= 1 else "?"


def show(results: Sequence[rows.Row]) -> str:
    """The table, in GiB."""

    def gib(value: int | None) -> str:
        return "?" if value is None else f"{value / 2**30:.1f}"

    sides: dict[tuple[str, str], dict[str, rows.Row]] = {}
    for row in results:
        sides.setdefault((row["model"], row["target"]), {})[row["implementation"]] = row
    lines = []
    for (model, target), of in sides.items():
        for side, row in of.items():
            over = row["too_large"]
            lines.append(
                (
                    *(model, target, side),
                    row["pairs"] if row["fits"] else "none",
                    f"{gib(row['peak_bytes'])} of {gib(row['capacity_bytes'])}",
                    f"{over} pairs: {gib(row['over_bytes'])}" if over else "",
                    ratio(*(of[x] for x in SIDES)) if len(of) == 2 else "",
                )
            )
    header = ("model", "target", "head", "pairs a device", "peak GiB", "next", "ratio")
    return rows.table(header, lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table and write the rows; 1 where ours fits no pair."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.plan")
    parser.add_argument("--only", metavar="TARGET", help="of this target: v5e, h200:1")
    parser.add_argument("--side", choices=SIDES, help="one only")
    parser.add_argument("--show", action="store_true", help="the rows that there are")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker is not None:
        answer_case(args.worker, args.side)
        return 0
    path = rows.RESULTS / "plan.json"
    wanted = [
        (index, case)
        for index, case in enumerate(CASES)
        if args.only in (None, *(case.target[:n] for n in range(1, 20)))
    ]
    for index, case in [] if args.show else wanted:
        for side in [args.side] if args.side else SIDES:
            run_case(index, case, side, path)
    results = rows.read(path)
    print(show(results))
    ours = [row for row in results if row["implementation"] == SIDES[0]]
    return 0 if all(row["fits"] for row in ours) else 1


def run_case(index: int, case: Case, side: str, path: Path) -> None:
    """Compile a case in a process of its own, and write each row as it comes."""
    from engine.planning.targets import parse_target

    environment = parse_target(case.target).environment
    words = ["--worker", str(index), "--side", side]
    for row in processes.ask_as_it_goes("bench.step.plan", words, environment):
        kept = rows.others(path, row, "model", "target", "implementation")
        rows.write_to(path, [*kept, row])
        print(show([row]).splitlines()[-1], f"{row['compile_s']} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
