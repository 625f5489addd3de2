"""Memory and work of a DPO step of Llama-3.1-8B, LoRA's beside full training's.

    python -m bench.step.lora [--target h200|v6e]

The engine's own step (policy, reference, backward, AdamW; bfloat16, remat full) for 4
pairs of 1024 tokens of which half are scored, compiled ahead of time for one device
that need not be here, and the compiler's account of it (`memory_analysis()`):

    argument_bytes  parameters, optimizer state, reference and batch: LoRA's base is in
                    it once, as the reference has no arrays of its own
    temp_bytes      activations, gradients, gathered weights
    matmul_flops    of the matrix products: 2 P R S for a pass of P weights over all
                    tokens, 2 T D V for one of the head over the scored ones. Full
                    training makes five (reference, policy, the policy again in the
                    backward pass, and two gradients), LoRA four: no weight of the base
                    has a gradient. The adapter's own are counted with their rank
    bound_ms        those at the device's peak: a bound from below, nothing is run

What does not fit is a row with the compiler's words.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from bench import processes, rows
from bench.op.memory import TARGETS, Target, device_mesh

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
PAIRS, LENGTH, SCORED = 4, 1024, 4096
RANK = 16
PEAK_TFLOPS = {"h200": 989.4, "v6e": 918.0}  # bfloat16, by their makers
SIDES = ("full", "LoRA, q_proj and v_proj", "LoRA, all linear modules")


def step_of(side: str, mesh: Any) -> tuple[Any, tuple[Any, ...], Any]:
    """The jitted step, what it is called with, and the policy's configuration."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from engine.config.dpo import DPOConfig
    from engine.models import Adapter, abstract_model, parse_hf_config, without_adapter
    from engine.models.adapter import LINEARS, PEFT_TARGETS
    from engine.objective.references import FrozenModel, SharedModel
    from engine.parallel.batch import abstract_batch
    from engine.parallel.sharding import make_mesh, place
    from engine.training.optimizer import learning_rate_schedule, make_optimizer
    from engine.training.prepare import loss_options, step_options
    from engine.training.step import abstract_state, make_train_step, split_model

    mesh = make_mesh(1, 1, 1, devices=list(mesh.devices.flat))
    config, base = DPOConfig(total_batch_size=PAIRS), parse_hf_config(LLAMA_8B)
    if side == SIDES[0]:
        policy = abstract_model(base, mesh=mesh)
        reference = FrozenModel(abstract_model(base, mesh=mesh, param_dtype="bfloat16"))
    else:
        modules = PEFT_TARGETS if side == SIDES[1] else tuple(LINEARS)
        adapter = Adapter(rank=RANK, alpha=2.0 * RANK, modules=modules)
        adapted = dataclasses.replace(base, adapter=adapter)
        policy = abstract_model(adapted, mesh=mesh)
        reference = SharedModel(without_adapter(policy), policy)
    optimizer = make_optimizer(config, policy.config, mesh, 100)
    schedule = learning_rate_schedule(config, 100)
    step = make_train_step(policy, reference, optimizer, schedule, step_options(config))
    whole = place(PartitionSpec(), mesh)
    numbers = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
        loss_options(config),
    )
    arguments = (
        abstract_state(policy, optimizer),
        split_model(policy)[2],
        reference.operands,
        abstract_batch((LENGTH, SCORED), (1, 1, PAIRS), mesh),
        numbers,
    )
    return step, arguments, policy.config


def flops(config: Any) -> int:
    """Of the matrix products of a step; see the module."""
    rows_of_model = 2 * PAIRS * LENGTH
    vocabulary = config.vocab_size * config.hidden_size
    matrices = {True: 0, False: 0}  # weights, by whether they are trained
    for (first, *_), param in config.parameters().items():
        if first == "layers" and len(param.shape) == 2:
            matrices[param.trainable] += config.num_layers * math.prod(param.shape)
    if config.adapter is None:
        return 10 * (rows_of_model * matrices[True] + SCORED * vocabulary)
    base = 8 * (rows_of_model * matrices[False] + SCORED * vocabulary)
    return base + 8 * rows_of_model * matrices[True]  # the reference has no adapter


def measure(name: str, target: Target) -> Iterator[rows.Row]:
    """A row for each side; runs in the environment of the target."""
    import jax

    mesh = device_mesh(target)
    for side in SIDES:
        start = time.perf_counter()
        step, arguments, config = step_of(side, mesh)
        count, account = flops(config), {}
        try:
            memory = step.lower(*arguments).compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            account["error"] = " ".join(str(error).split())[:300]
        else:
            account = {
                "argument_bytes": memory.argument_size_in_bytes,
                "temp_bytes": memory.temp_size_in_bytes,
                "peak_bytes": memory.peak_memory_in_bytes,
            }
        yield rows.row(
            "DPO step, Llama-3.1-8B",
            side,
            T=SCORED,
            D=config.hidden_size,
            V=config.vocab_size,
            dtype="bfloat16",
            device=target.device,
            compiler=f"{target.compiler} {version(target.compiler)}",
            matmul_flops=count,
            bound_ms=round(1e3 * count / (PEAK_TFLOPS[name] * 1e12), 1),
            pairs=PAIRS,
            length=LENGTH,
            rank=None if config.adapter is None else RANK,
            trained=sum(
                math.prod(x.shape) for x in jax.tree.leaves(arguments[0].params)
            ),
            compile_s=round(time.perf_counter() - start, 1),
            **account,
        )


def show(results: Sequence[rows.Row]) -> str:
    """The table, in GiB."""

    def gib(row: rows.Row, key: str) -> str:
        return f"{row[key] / 2**30:.1f}" if row.get(key) else row.get("error", "")[:40]

    return rows.table(
        ("device", "trained", "parameters", "arguments GiB", "temporaries GiB")
        + ("peak GiB", "ms at peak"),
        [
            (
                *(row["device"], row["implementation"], f"{row['trained']:,}"),
                *(gib(row, f"{x}_bytes") for x in ("argument", "temp", "peak")),
                f"{row['bound_ms']:.0f}",
            )
            for row in results
        ],
    )


def main(argv: list[str] | None = None) -> int:
    """Print the table and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.lora")
    parser.add_argument("--target", choices=PEAK_TFLOPS, help="one only; writes none")
    parser.add_argument("--worker", choices=PEAK_TFLOPS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        processes.answer(list(measure(args.worker, TARGETS[args.worker])))
        return 0
    results: list[rows.Row] = []
    for name in [args.target] if args.target else PEAK_TFLOPS:
        environment = TARGETS[name].environment
        results += processes.ask("bench.step.lora", ["--worker", name], environment)
    print(show(results))
    if not args.target:
        print("wrote", rows.write("lora", results).relative_to(rows.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
