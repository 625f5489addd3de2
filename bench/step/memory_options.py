"""What each option saves of a device's memory: Llama-3.1-8B on eight absent devices.

    JAX_PLATFORMS=cpu python -m bench.step.memory_options [--only 8bit] [--show]

The engine's own step (policy, reference, backward, AdamW; parameters float32, products
bfloat16, remat full, every device on the fsdp axis), two pairs of 2,048 tokens on each
device, compiled ahead of time as `dpo plan` does; nothing runs. The devices are H200s,
and v5p chips for what a compiler for absent NVIDIA devices does not know: arguments in
the host's memory. Bytes are a device's:

    held_bytes        what it holds throughout, by what it is
    reference_on_host_bytes  of its host's memory
    peak_bytes        that and the step's temporaries
    temporary_bytes   of which gradient_bytes are the gradients
    collectives       what a step moves between devices

Rows are written as they come, those of other options stay.
"""

import sys
from collections.abc import Sequence

from bench import rows
from bench.step.planned import Option, Table, gib

H200, V5P = "h200:8", "v5p:2x2x2"
OPTIONS = (
    Option(target=H200, name="float32 moments"),
    Option(
        target=H200, name="bfloat16 first moments", trainer={"mu_dtype": "bfloat16"}
    ),
    Option(
        name="bfloat16 moments",
        target=H200,
        trainer={"mu_dtype": "bfloat16", "nu_dtype": "bfloat16"},
    ),
    Option(
        target=H200,
        name="8bit moments",
        trainer={"mu_dtype": "8bit", "nu_dtype": "8bit"},
    ),
    Option(
        target=H200,
        name="layers' inputs in the host's memory",
        model={"remat": "offload"},
    ),
    Option(
        target=H200,
        name="gradients added up in float32",
        model={"reduce_dtype": "float32"},
    ),
    Option(target=V5P, name="float32 moments"),
    Option(
        name="layers' inputs in the host's memory",
        target=V5P,
        model={"remat": "offload"},
    ),
    Option(
        name="reference in the host's memory",
        target=V5P,
        trainer={"offload_ref_model": True},
    ),
)


def show(results: Sequence[rows.Row]) -> str:
    """The table, in GiB of a device."""

    lines = []
    for row in results:
        wire = sum(x["wire"] for x in row["collectives"])
        held, temporary = row["held_bytes"], row["temporary_bytes"]
        lines.append(
            (
                row["target"],
                row["implementation"],
                gib(held["optimizer"]),
                gib(sum(held.values())),
                gib(temporary - row["gradient_bytes"]),
                gib(row["peak_bytes"]),
                gib(wire),
            )
        )
    header = ("target", "options", "optimizer", "held", "activations", "peak")
    return rows.table((*header, "received"), lines)


TABLE = Table(
    module="bench.step.memory_options",
    path=rows.RESULTS / "memory_options.json",
    options=OPTIONS,
    show=show,
)


if __name__ == "__main__":
    sys.exit(TABLE.main(None))
