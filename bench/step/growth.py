"""How what a step costs grows with the work, on the CPU; and the data's side of it.

    python -m bench.step.growth [--only step|batches|loading]

One size at a time is doubled, the others as in the first row: a Llama of 4 layers,
D=256, V=32000, 4 pairs of 256 tokens, half of them prompt, float32, one device.

    seconds      of a step, the best of 3
    temp_bytes   of the step, by the compiler's account
    compile_s    to compile it
    exponent     of the last against the first: log(ratio of costs) / log(ratio of
                 sizes); 1 is linear, below 1 a part of the cost is the same for all

    batches      pairs a second that the loader lays out, nothing else running: of
                 lognormal lengths (median 150, sigma 0.8), in batches of 16
    loading      memory of a process that loads a checkpoint of six files, onto one
                 device or split over eight, beyond what it had after a small one,
                 beside the bytes of the parameters (RssAnon, every 2 ms: the files'
                 pages, which the kernel may drop, are not in it)

Exits with 1 where memory grows faster than work (exponent above 1.05), where compiling
takes longer for more layers (1.3 times for 16 times the layers), or where loading takes
more than 1.05 of the parameters and their largest once more. Draws growth.png beside
the rows.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.update(
    JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=os.environ.get("BENCH_DEVICES", "1")
)
os.environ.pop("XLA_FLAGS", None)

from bench import processes, rows

BASE = {"pairs": 4, "length": 256, "vocab": 32000, "layers": 4}
SIZES = {
    "pairs": (4, 8, 16),
    "length": (256, 512, 1024),
    "vocab": (32000, 64000, 128000),
    "layers": (2, 8, 32),
}
ROUNDS = 3
MEMORY_EXPONENT, COMPILE_GOAL, LOADING_GOAL = 1.05, 1.3, 1.05
LAYERS, HIDDEN, FFN, VOCAB, FILES = 6, 1024, 4096, 64000, 6  # of what is loaded
LOADED_ON = 1, 8  # devices of one process, all on fsdp


def step_costs(sizes: dict[str, int]) -> dict[str, float]:
    """Of one step, in this process."""
    from bench.step.candidates import OURS, Workload, make_candidate

    half = sizes["length"] // 2
    candidate = make_candidate(
        OURS,
        Workload(
            vocab=sizes["vocab"],
            layers=sizes["layers"],
            pairs=sizes["pairs"],
            prompt=half,
            completion=half,
        ),
    )
    candidate()
    return {
        "seconds": min(candidate()["wall"] for _ in range(ROUNDS)),
        "temp_bytes": candidate.temporaries,
        "compile_s": round(candidate.compile_seconds, 2),
    }


def pairs_a_second(count: int) -> float:
    """Of the loader, over an epoch of so many pairs."""
    import numpy as np

    from engine.data.batches import BatchPlan, Order
    from engine.data.layouts import Layout
    from engine.data.tokenization import PairTokens

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(math.log(150), 0.8, 2 * count), 8, 2048).astype(int)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    starts = lengths // 2
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    tokens = PairTokens(
        tokens=rng.integers(0, 32000, offsets[-1]).astype(np.int32),
        scored=within >= np.repeat(starts, lengths),
        offsets=offsets,
        completion_start=starts.astype(np.int32),
        rows=np.arange(count),
        weights=np.ones(count, np.float32),
    )
    order = Order(num_pairs=count, pairs_per_batch=16, shuffle=True)
    plan = BatchPlan(order, Layout(tokens, 16, 1, 1))
    began = time.perf_counter()
    batches = sum(1 for _ in plan.batches())
    assert batches == plan.steps
    return count / (time.perf_counter() - began)


def write_checkpoint(folder: Path) -> tuple[int, int]:
    """A Llama's files, and the bytes of its parameters and of the largest one."""
    import numpy as np
    from safetensors.numpy import save_file

    from engine.models import parse_hf_config

    fields = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    table = parse_hf_config(fields).parameters().values()
    names = [
        (parameter.hf_name.format(layer), parameter.shape)
        for parameter in table
        for layer in range(LAYERS if parameter.stacked else 1)
    ]
    of = {
        name: f"model-{i % FILES + 1:05}.safetensors"
        for i, (name, _) in enumerate(names)
    }
    for file in sorted(set(of.values())):
        arrays = {n: np.ones(s, np.float32) for n, s in names if of[n] == file}
        save_file(arrays, folder / file)
    index = {"metadata": {}, "weight_map": of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    stacks = [4 * math.prod(p.shape) * (LAYERS if p.stacked else 1) for p in table]
    return sum(stacks), max(stacks)


def load(folder: str) -> int:
    """Bytes that loading took at most, in this process."""
    import jax

    from bench.step.plan_check import status
    from engine import load_model
    from engine.parallel.sharding import make_mesh

    mesh = make_mesh()
    # What threads and libraries keep for good is not the large one's.
    small = load_model(rows.ROOT / "examples/demo/model", mesh=mesh)
    jax.block_until_ready(small.head_weight())
    del small
    before, seen, loaded = status("RssAnon"), [0], threading.Event()

    def watch() -> None:
        while not loaded.wait(0.002):
            seen.append(status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(folder, mesh=mesh, dtype="float32")
    loaded.set()
    watcher.join()
    assert model.hf_config["vocab_size"] == VOCAB
    return max(seen) - before


def measure(only: str | None) -> list[rows.Row]:
    """A row for each size, two for the loader, one for loading."""
    found = []

    def add(op: str, **more: Any) -> None:
        found.append(
            rows.row(
                op,
                "dpo_kernels",
                T=more.get("pairs", 0) * more.get("length", 0),
                D=256,
                V=more.get("vocab", 0),
                dtype="float32",
                load=os.getloadavg()[0],
                **more,
            )
        )
        print(op, more, file=sys.stderr, flush=True)

    for name, values in SIZES.items() if only in (None, "step") else ():
        for value in values:
            sizes = BASE | {name: value}
            words = ["--sizes", json.dumps(sizes)]
            costs = processes.ask("bench.step.growth", words, {})
            add("DPO step, growing", grows=name, size=value, **sizes, **costs)
    for count in (10_000, 100_000) if only in (None, "batches") else ():
        rate = pairs_a_second(count)
        add("batches", grows="pairs of the data", size=count, pairs_per_s=round(rate))
    if only in (None, "loading"):
        with tempfile.TemporaryDirectory() as folder:
            total, largest = write_checkpoint(Path(folder))
            whole = {"parameter_bytes": total, "largest_bytes": largest}
            for count in LOADED_ON:
                words, changes = ["--load", folder], {"BENCH_DEVICES": str(count)}
                taken = processes.ask("bench.step.growth", words, changes)
                add("loading", devices=count, peak_bytes=taken, **whole)
    made = {row["op"] for row in found}
    kept = [x for x in rows.read(rows.RESULTS / "growth.json") if x["op"] not in made]
    return [*kept, *found]


def exponents(found: list[rows.Row]) -> dict[str, dict[str, float]]:
    """Of each cost, by what grows."""
    result = {}
    for name in SIZES:
        first, *_, last = (row for row in found if row.get("grows") == name)
        by = math.log(last["size"] / first["size"])
        result[name] = {
            cost: math.log(last[cost] / first[cost]) / by
            for cost in ("ms", "temp_bytes", "compile_s")
        }
    return result


def missed(found: list[rows.Row]) -> list[str]:
    """Goals that were not reached."""
    words = []
    for name, costs in exponents(found).items():
        if costs["temp_bytes"] > MEMORY_EXPONENT:
            words.append(f"{name}: temporaries grow by {costs['temp_bytes']:.2f}")
    layers = [row["compile_s"] for row in found if row.get("grows") == "layers"]
    if layers[-1] > COMPILE_GOAL * layers[0]:
        words.append(f"layers: {layers} s to compile")
    for one in (row for row in found if row["op"] == "loading"):
        whole = one["parameter_bytes"] + one["largest_bytes"]
        if one["peak_bytes"] > LOADING_GOAL * whole:
            words.append(f"loading: {one['peak_bytes']:,} bytes")
    return words


def draw(found: list[rows.Row], path: Path) -> None:
    """Time, temporaries and compilation against each size, relative to its first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator, ScalarFormatter

    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    costs = {
        "ms": "time of a step",
        "temp_bytes": "temporaries",
        "compile_s": "compiling",
    }
    for axis, name in zip(axes, SIZES, strict=True):
        grown = [row for row in found if row.get("grows") == name]
        sizes = [row["size"] for row in grown]
        axis.plot(
            sizes, [x / sizes[0] for x in sizes], ":", color="0.6", label="linear"
        )
        for (cost, label), marker in zip(costs.items(), "os^", strict=True):
            axis.plot(
                sizes,
                [row[cost] / grown[0][cost] for row in grown],
                marker=marker,
                label=label,
            )
        axis.set(xscale="log", yscale="log", xlabel=name)
        axis.set_xticks(sizes, [f"{x:,}" for x in sizes])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_yticks([0.5, 1, 2, 4, 8, 16])
    axes[0].set_ylabel("relative to the first")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    """Print the table, keep the rows, draw them; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.growth")
    parser.add_argument("--only", choices=("step", "batches", "loading"))
    parser.add_argument("--sizes", help=argparse.SUPPRESS)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.sizes is not None:
        processes.answer(step_costs(json.loads(args.sizes)))
        return 0
    if args.load is not None:
        processes.answer(load(args.load))
        return 0
    found = measure(args.only)
    cells = [
        (name, *(f"{x:.2f}" for x in costs.values()))
        for name, costs in exponents(found).items()
    ]
    print(rows.table(("grows", "time", "temporaries", "compiling"), cells))
    draw(found, rows.RESULTS / "growth.png")
    print(f"\nwrote {rows.write('growth', found)}")
    words = missed(found)
    print("\n".join(words), file=sys.stderr)
    return 1 if words else 0


if __name__ == "__main__":
    sys.exit(main())
