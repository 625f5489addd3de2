"""What a step has to take on this CPU, part by part, and what each part does take.

    python -m bench.step.floor [--pairs 2] [--length 384]

A model of SmolLM2-135M's shape (30 layers, D=576, V=49152, tied), random weights, full
training in float32 with AdamW, `remat: full`, every second token scored; one device.

    flops         of the parts' matrix products, counted in the traced step itself
                  (`engine.planning.work`)
    floor         those FLOPs at the rate that XLA's bare product of the same shape has
                  here, each of `x W^T`, `dy W` and `dy^T x` at its own; of attention,
                  the products of a tile of queries and keys; of the optimizer, 7 * 4
                  bytes a parameter (read p, m, v and the gradient, write p, m, v) at
                  the rate of a copy
    alone         the part as the engine has it, compiled by itself, without the rest

The layers are measured whole: what they take beyond the floors of projections and
attention is norms, rope, gates, residuals, and what moves between them. Means of 2,
after one that is not counted.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1")
os.environ.pop("XLA_FLAGS", None)

import jax
import jax.numpy as jnp

from bench import rows
from bench.step.floor_parts import (
    attention_seconds,
    floors,
    head_seconds,
    layers_seconds,
    optimizer_seconds,
    seconds_in_place,
)
from bench.step.plan_cases import write_config
from bench.step.plan_check import operands_of, planned_step
from engine.models import init_model
from engine.parallel.sharding import make_mesh
from engine.planning.steps import Step
from engine.planning.work import (
    ATTENTION,
    BACKWARD,
    FORWARD,
    HEAD,
    PHASES,
    RECOMPUTED,
)

REMATS = ("none", "dots", "full")
MODEL = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}


def step_of(pairs: int, length: int, remat: str) -> Step:
    """The step of that model."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_config(MODEL, Path(folder))
        return planned_step(model, pairs, length, dtype="float32", remat=remat)


def step_seconds(step: Step) -> tuple[float, float, int]:
    """Of the whole step; to compile it; and its temporaries in bytes."""
    began = time.perf_counter()
    compiled = step.request.step.lower(*step.operands).compile()
    compiling = time.perf_counter() - began
    state, *others = operands_of(step)
    seconds = seconds_in_place(lambda *args: compiled(*args)[0], state, *others)
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    return seconds, compiling, temporaries


def measure(pairs: int, length: int) -> list[rows.Row]:
    """The rows of the table."""
    found: list[rows.Row] = []
    sequences = 2 * pairs
    step = step_of(pairs, length, "full")

    def add(part: str, phase: str, seconds: float | None, **more: Any) -> None:
        found.append(
            rows.row(
                "DPO step, by parts",
                "dpo_kernels",
                T=step.shape[1],
                D=MODEL["hidden_size"],
                V=MODEL["vocab_size"],
                dtype="float32",
                seconds=seconds,
                part=part,
                phase=phase,
                pairs=pairs,
                length=length,
                load=os.getloadavg()[0],
                **more,
            )
        )

    floor = floors(step, sequences, length)
    for (part, phase), (flops, seconds) in floor.items():
        add(part, phase, None, gflop=flops / 1e9, floor_ms=1e3 * seconds)
    config, mesh = step.model, mesh_of_one()
    add_times(add, attention_seconds(config, sequences, length), ATTENTION, floor)
    add_times(add, head_seconds(config, step.shape[1]), HEAD, floor)
    tokens = jnp.zeros((sequences, length), jnp.int32)
    for remat in REMATS:
        model = init_model(config, mesh=mesh, dtype="float32", remat=remat)
        add_times(add, layers_seconds(model, tokens), f"layers, remat {remat}", {})
        del model
    seconds, least = optimizer_seconds(
        init_model(config, mesh=mesh, dtype="float32"), step.run.arguments
    )
    add("optimizer", "update", seconds, floor_ms=1e3 * least)
    for remat in REMATS:
        seconds, compiling, temporaries = step_seconds(step_of(pairs, length, remat))
        more = {"compile_s": compiling, "temp_bytes": temporaries}
        add(f"step, remat {remat}", "all", seconds, **more)
    return found


def mesh_of_one() -> Any:
    """A mesh of the first device."""
    return make_mesh(1, 1, 1, jax.devices()[:1])


def add_times(
    add: Callable[..., None], seconds: tuple[float, float], part: str, floor: Any
) -> None:
    """Rows of a part's forward, and of it with its gradient."""
    least = floor.get((part, FORWARD), (0, 0.0))[1]
    back = floor.get((part, BACKWARD), (0, 0.0))[1]
    add(part, "alone, forward", seconds[0], floor_ms=1e3 * least or None)
    # Attention and the head recompute what they need inside their gradients.
    both = 1e3 * (2 * least + back) if least else None
    add(part, "alone, forward and gradient", seconds[1], floor_ms=both)


def show(found: list[rows.Row]) -> None:
    """Print the table, and the sum of the floors."""
    cells = [
        (
            row["part"],
            row["phase"],
            f"{row['gflop']:.0f}" if row.get("gflop") else "",
            f"{row['floor_ms'] / 1e3:.2f}" if row.get("floor_ms") else "",
            f"{row['ms'] / 1e3:.2f}" if row["ms"] else "",
        )
        for row in found
    ]
    print(rows.table(("part", "phase", "GFLOP", "floor, s", "takes, s"), cells))
    of_phases = [row for row in found if row["phase"] in PHASES + ("update",)]
    whole = sum(row["floor_ms"] for row in of_phases) / 1e3
    again = sum(row["floor_ms"] for row in found if row["phase"] == RECOMPUTED) / 1e3
    print(f"\nfloor of the step: {whole:.1f} s, of which recomputed {again:.1f} s")


def main(argv: list[str] | None = None) -> int:
    """Print the table and keep the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.floor")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--length", type=int, default=384)
    args = parser.parse_args(argv)
    found = measure(args.pairs, args.length)
    show(found)
    print(f"\nwrote {rows.write('floor', found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
