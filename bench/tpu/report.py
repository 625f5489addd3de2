"""Tables of predictions from schedules."""

import json
from collections.abc import Sequence

from bench import rows
from bench.tpu.model import Operation, hot_blocks

NOTE = "predicted from the compiler's schedule, not measured"

HEADER = ("TPU", "program", "T", "D", "V", "options", "ms", "TFLOP/s", "% peak")
HEADER += (
    "binds",
    "wait %",
    "steps",
    "cycles/step",
    "bytes/step",
    "other ms",
    "spills",
)
HEADER += ("temporaries MiB",)


def show(results: Sequence[rows.Row]) -> str:
    """The table of predictions."""
    cells = []
    for row in results:
        options = row["options"] or row.get("config", "")
        text = json.dumps(options) if options else ""
        cells.append(
            (
                row["device"].split(",")[0].removeprefix("TPU "),
                *(row["implementation"], row["T"], row["D"], row["V"], text),
                *(row["ms"], row["tflops"], row["pct_peak"], row["binds"]),
                *(row["wait_pct"], row["steps"], f"{row['cycles_per_step']:,}"),
                *(f"{row['bytes_per_step']:,}", row["other_ms"], row["spills"]),
                f"{row['temp_bytes'] / rows.MIB:,.1f}",
            )
        )
    return rows.table(HEADER, cells)


SLOTS = (
    "vmatmul",
    "vmatpush",
    "vmatprep",
    "mxu_pop",
    "vld",
    "vst",
    "valu",
    "eup",
    "xlu",
)


def show_blocks(done: Sequence[Operation]) -> str:
    """Where the cycles of each Pallas kernel go, and what fills the bundles there.

    A region's share of the matrix unit is what its matmuls need at peak over its
    cycles; the slots are instructions a bundle.
    """
    parts = []
    for one in done:
        if not one.pallas:
            continue
        cells = []
        for block in hot_blocks(one.run):
            cycles = block.bundles + block.stall
            share = block.matmul_rows * one.chip.row_cycles / cycles
            cells.append(
                (
                    f"{block.start:#x}",
                    *(block.depth, block.visits, f"{block.bundles:,}"),
                    f"{block.stall:,.0f}",
                    f"{block.wait / block.visits:,.0f}",
                    f"{100 * block.cycles / one.run.cycles:.1f}",
                    f"{100 * share:.0f}",
                    *(f"{block.slots[s] / block.bundles:.2f}" for s in SLOTS),
                    block.spills,
                )
            )
        header = ("from", "loops", "visits", "bundles", "stall", "wait", "% of time")
        header += ("% matrix peak", *SLOTS, "spills")
        parts.append(f"{one.name}, by region:\n{rows.table(header, cells)}")
    return "\n\n".join(parts)
