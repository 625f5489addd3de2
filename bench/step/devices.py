"""How compiling, and each device's memory, change with the number of devices.

    JAX_PLATFORMS=cpu python -m bench.step.devices [--target h200:8] [--show]

The engine's step of Llama-3.1-8B, 2 pairs of 2,048 tokens at once on each device, on 2
to 8 H200s and on slices of v5p: see `bench.step.planned`. So that one device has the
memory for it, moments are kept in 8 bits, and the reference's log-probabilities are
scored beforehand. Nothing runs.
"""

import sys
from collections.abc import Sequence

from bench import rows
from bench.step.planned import Option, Table, gib

TARGETS = "h200:2", "h200:4", "h200:8", "v5p:2x2x2", "v5p:4x4x4"
SMALL = {"mu_dtype": "8bit", "nu_dtype": "8bit", "precompute_ref_log_probs": True}
OPTIONS = [Option(name="8bit moments", target=x, trainer=SMALL) for x in TARGETS]


def show(results: Sequence[rows.Row]) -> str:
    """The table: GiB of a device, and the seconds that compiling took."""
    lines = [
        (
            row["target"],
            row["compile_s"],
            gib(sum(row["held_bytes"].values())),
            gib(row["gradient_bytes"]),
            gib(row["temporary_bytes"] - row["gradient_bytes"]),
            gib(row["peak_bytes"]),
            gib(sum(x["wire"] for x in row["collectives"])),
        )
        for row in results
    ]
    header = ("target", "compiled in s", "held", "gradients", "activations", "peak")
    return rows.table((*header, "received"), lines)


TABLE = Table(
    module="bench.step.devices",
    path=rows.RESULTS / "devices.json",
    options=OPTIONS,
    show=show,
)


if __name__ == "__main__":
    sys.exit(TABLE.main(None))
