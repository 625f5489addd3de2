"""Does a step take the memory that `dpo plan` says? On the CPU, where it can run.

    python -m bench.step.plan_check

Each of a few models' train steps is planned for `cpu:1`, and then run, in a process of
its own: the compiled step, on arrays of its operands' shapes and a full batch.

    planned_bytes   arguments, results that are not donated, and temporaries of the
                    executable, by XLA's account: what a plan calls the peak
    measured_bytes  the most memory that the process had while the step ran (VmHWM,
                    after clear_refs) less what it had before there was any array; the
                    second time, as threads and libraries keep some of the first

What a run of `dpo train` has besides, Python, libraries and compiled programs, is in
neither: about a gigabyte, which no plan for another machine can know. Exits with 1
where both differ by more than 5 % in float32. Products in bfloat16 take buffers of the
CPU's library for them, of which XLA's account knows nothing.
"""

import argparse
import ctypes
import gc
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import processes, rows
from bench.step.plan_cases import run_of, write_config

TOLERANCE = 0.05
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": None}
DEMO = "examples/demo/model"
_LLAMA = {
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
MEDIUM = _LLAMA | {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "tie_word_embeddings": False,
}
WIDE = MEDIUM | {"vocab_size": 128256, "num_hidden_layers": 4}
# Name, model, pairs, tokens of a row, remat, dtype of the computation.
CASES: tuple[tuple[str, Any, int, int, str, str], ...] = (
    ("the demo's model", DEMO, 16, 64, "none", "float32"),
    ("the demo's model, 256 pairs", DEMO, 256, 64, "none", "float32"),
    ("Llama, 58 million parameters", MEDIUM, 8, 256, "full", "float32"),
    ("the same, nothing recomputed", MEDIUM, 8, 256, "none", "float32"),
    ("the same, bfloat16", MEDIUM, 8, 256, "full", "bfloat16"),
    ("Llama, V=128256", WIDE, 8, 256, "full", "float32"),
)


def planned_step(model: str, pairs: int, length: int, **options: Any) -> Any:
    """The engine's step for the largest batches of such a run, on this CPU.

    Args:
        model: a directory; options: the model's.
    """
    from engine.planning.devices import devices_of
    from engine.planning.models import model_configs
    from engine.planning.steps import make_step
    from engine.planning.targets import parse_target

    run = run_of(model, pairs, length, options=options)
    mesh = run.sharding.mesh(devices_of(parse_target("cpu:1")))
    return make_step(run, *model_configs(run), mesh)


def step_of(case: int, folder: Path) -> Any:
    """The planned step of a case."""
    _, model, pairs, length, remat, dtype = CASES[case]
    if isinstance(model, dict):
        model = write_config(model, folder)
    return planned_step(model, pairs, length, dtype=dtype, remat=remat)


def operands_of(step: Any) -> tuple[Any, ...]:
    """Arrays of the step's shapes; a batch in which every capacity is used."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    state, frozen, reference, batch, numbers = jax.tree.map(
        lambda x: jax.device_put(jnp.full(x.shape, 1e-3, x.dtype), x.sharding),
        step.operands,
    )
    (_, rows_, length), capacity = batch.rows.tokens.shape, step.shape[1]
    each = length // 2
    starts = np.arange(rows_)[:, None] * length + length - each - 1
    positions = np.resize((starts + np.arange(each)).ravel(), (1, 1, capacity))
    scored = batch.scored._replace(
        positions=jnp.asarray(positions, jnp.int32),
        counts=jnp.full_like(batch.scored.counts, each),
    )
    pairs = batch.pairs._replace(weights=jnp.ones_like(batch.pairs.weights))
    return state, frozen, reference, batch._replace(scored=scored, pairs=pairs), numbers


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise AssertionError(f"the kernel says no {name}")


def run_once(compiled: Any, step: Any) -> None:
    """Run the step on arrays of its own; from the moment when these are there, the
    most memory is taken down.
    """
    import jax

    operands = operands_of(step)
    jax.block_until_ready(operands)
    Path("/proc/self/clear_refs").write_text("5")
    state, out = compiled(*operands)
    jax.block_until_ready((state, out))
    assert bool(out.finite)


def measure(case: int) -> dict[str, int]:
    """Plan a step, run it, and compare."""
    from engine.planning.account import take_account
    from engine.planning.targets import parse_target

    with tempfile.TemporaryDirectory() as folder:
        step = step_of(case, Path(folder))
        planned = take_account(step, parse_target("cpu:1")).peak
        compiled = step.request.step.lower(*step.operands).compile()
    # Once before: what threads and libraries keep for good is not the step's.
    run_once(compiled, step)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    run_once(compiled, step)
    return {
        "planned": planned or 0,
        "measured": status("VmHWM") - before,
        "T": step.shape[1],
        "D": step.model.hidden_size,
        "V": step.model.vocab_size,
    }


def main(argv: list[str] | None = None) -> int:
    """Print the table and write the rows; 1 where a plan is wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.plan_check")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker is not None:
        processes.answer(measure(args.worker))
        return 0
    results, right = [], True
    for index, (name, _, pairs, length, remat, dtype) in enumerate(CASES):
        words = ["--worker", str(index)]
        found = processes.ask("bench.step.plan_check", words, ENVIRONMENT)
        planned, measured = found["planned"], found["measured"]
        off = abs(measured - planned)
        right &= off <= TOLERANCE * measured or dtype != "float32"
        results.append(
            rows.row(
                "DPO step, planned and run",
                "dpo_kernels",
                T=found["T"],
                D=found["D"],
                V=found["V"],
                dtype=dtype,
                compiler=f"jaxlib {version('jaxlib')}",
                model=name,
                pairs=pairs,
                length=length,
                remat=remat,
                planned_bytes=planned,
                measured_bytes=measured,
                measured_over_planned=round(measured / planned, 4),
            )
        )
        rows.write("plan_check", results)
        mib = (f"{x / rows.MIB:,.1f}" for x in (planned, measured))
        print(name, *mib, f"{measured / planned:.3f}", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
