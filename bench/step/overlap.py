"""What runs beside computation: Llama-3.1-8B's exchanges on devices that are absent.

    JAX_PLATFORMS=cpu python -m bench.step.overlap [--target v6e:4x4] [--show]

The engine's step with `overlap_collectives`, as by default, and without: see
`bench.step.planned`. Of the compiled program is read what each device receives, and
what it receives while no product, kernel or loop runs (*exposed*); bandwidths are the
makers' (`engine/planning/targets.py`), rings are taken for granted. Nothing runs:
whether what is listed beside a product is done by its end, a compiler does not say.
"""

import sys
from collections.abc import Sequence

from bench import rows
from bench.step.planned import Option, Table, gib

# As many pairs at once as each has the memory for, up to 2.
TARGETS = {"v5e:4x4": 1, "v5p:2x2x2": 2, "v6e:4x4": 2, "tpu7x:2x2x1": 2, "h200:8": 2}
WITH, WITHOUT = "beside computation", "one after the other"
OPTIONS = [
    Option(name=name, target=target, pairs=pairs, trainer=trainer)
    for target, pairs in TARGETS.items()
    for name, trainer in ((WITH, {}), (WITHOUT, {"overlap_collectives": False}))
]


def show(results: Sequence[rows.Row]) -> str:
    """The table: GiB of a device, and seconds by its peak rates."""
    lines = []
    for row in results:
        received = sum(x["wire"] for x in row["collectives"])
        exposed = sum(x["exposed"] for x in row["collectives"])
        times = row["roofline"]
        lines.append(
            (
                row["target"],
                row["implementation"],
                gib(received),
                gib(exposed),
                f"{times['products_s']:.3f}",
                f"{times['communication_s']:.3f}",
                f"{times['exposed_s']:.3f}",
                gib(row["peak_bytes"]),
            )
        )
    header = ("target", "exchanges", "received", "exposed", "products s")
    return rows.table((*header, "exchanges s", "exposed s", "peak"), lines)


TABLE = Table(
    module="bench.step.overlap",
    path=rows.RESULTS / "overlap.json",
    options=OPTIONS,
    show=show,
)


if __name__ == "__main__":
    sys.exit(TABLE.main(None))
