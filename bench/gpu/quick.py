"""The op on one GPU in less than three minutes: what one runs, and reads, first.

    python -m bench.gpu.quick [--implementation NAME] [--output FILE] [--rehearse]

At the main shape in bfloat16, a row at a time: R, which is XLA's bare product
hidden @ head.T; ours, forward (2TDV); ours, forward and gradient (8TDV); plain JAX,
which keeps the logits (6TDV); then errors of both, relative to float64 in blocks of
rows. `pct_peak` is the share of an R that takes turns with that row. Exits with 1 where
an error exceeds what plain JAX's own allows, with 2 where there is no GPU.

From a cold start on an H100, estimated: 20 s until JAX has the GPU and the inputs, then
5 s for R, 15 s forward, 25 s gradient, 20 s plain JAX, 35 s truth. Of a row 3 s are
timing; compiling all five programs takes 7 s of processor time (measured, ahead of time
for an H200), and the rest is for XLA's trials of products. The truth needs the most
memory, 15 GiB. `--rehearse` runs on a CPU, at a tiny shape.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from bench import rows
from bench.device import plan, programs
from bench.device.subject import Subject
from bench.device.timing import take_turns
from bench.gpu import sizes, summary
from bench.gpu.clocks import clocks
from bench.gpu.truth import token_truth
from bench.op.peers import PEERS
from dpo_kernels.op.backends import BACKENDS
from dpo_kernels.verify.cases import bound
from dpo_kernels.verify.real import largest, relative_errors

PEER = "plain JAX, optax"


def compiled(function: Callable, x: programs.Inputs, x64: bool = False) -> Any:
    """Now, not at the first call."""
    with jax.enable_x64(x64):
        return jax.jit(function).lower(x).compile()


def give(row: rows.Row, output: Path) -> None:
    """A line of JSON in the file and a shorter one on the terminal, at once."""
    with output.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(summary.line(row), flush=True)


class Run:
    """One shape: what is timed there, and where the rows go."""

    def __init__(self, size: plan.Plan, output: Path):
        self.size, self.output = size, output
        self.x = programs.make_inputs(size.main)
        self.bare = compiled(programs.matmul, self.x)

    def give(self, op: str, name: str, **fields: Any) -> None:
        """The row of a program or of its errors."""
        fields |= dict(zip("TDV", self.size.main, strict=True)) | {"dtype": "bfloat16"}
        fields |= {"device": jax.devices()[0].device_kind}
        row = rows.row(op, name, **fields, xla_flags=os.environ.get("XLA_FLAGS", ""))
        give(row, self.output)

    def time(self, op: str, name: str, program: Any, flops: int) -> Any:
        """The row of a program, timed in turns with the bare product."""
        (T, D, V), wait = self.size.main, jax.block_until_ready
        bare, one = (
            Subject(op=what, implementation=name, T=T, D=D, V=V) for what in ("R", op)
        )
        calls = {bare: lambda: self.bare(self.x), one: lambda: program(self.x)}
        times = take_turns(calls, wait, self.size, lambda _: None)
        R = plan.FLOPS[plan.MATMUL] * T * D * V / times[bare].median / 1e12
        fields = times[one].fields() | clocks(calls[one], wait)
        fields["peak_bytes"] = program.memory_analysis().peak_memory_in_bytes
        fields |= {"seconds": times[one].median, "flops": flops * T * D * V}
        self.give(op, name, peak_tflops=R, **fields)
        return program

    def check(self, gradients: Mapping[str, Any]) -> bool:
        """The errors' rows; whether each is within what the peer's allows."""
        truth, right = compiled(token_truth, self.x, x64=True)(self.x), True
        with jax.enable_x64(True):
            found = {k: relative_errors(f(self.x), truth) for k, f in gradients.items()}
        most = [bound(largest(errors), "bfloat16") for errors in found[PEER]]
        for name, errors in found.items():
            forward, gradient = map(largest, errors)
            passed = forward <= most[0] and gradient <= most[1]
            fields = {"forward_error": forward, "gradient_error": gradient}
            self.give(plan.VERIFY, name, **fields, bounds=most, passed=passed)
            right = right and passed
        return right


def has_gpu(*, rehearse: bool) -> bool:
    """Take it, or a CPU; says why there is none."""
    jax.config.update("jax_platforms", "cpu" if rehearse else "cuda")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # a plugin that finds no driver
        print(f"no GPU that JAX can use was found; --rehearse needs none {error}")
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Print and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.quick")
    parser.add_argument("--implementation", choices=BACKENDS, help="not the fastest")
    parser.add_argument("--output", type=Path, help="lines of JSON, added to")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny")
    args = parser.parse_args(argv)
    if not has_gpu(rehearse=args.rehearse):
        return 2
    size = sizes.REHEARSAL if args.rehearse else sizes.REAL
    results = Path(os.devnull) if args.rehearse else rows.RESULTS / "gpu_quick.jsonl"
    run = Run(size, args.output or results)
    backend = args.implementation or programs.backends(size.main)[0]
    f, x, ours = programs.ours(backend, plan.WORKSPACE), run.x, f"dpo_kernels {backend}"
    run.time(plan.MATMUL, "XLA", run.bare, 2)
    run.time(plan.FORWARD, ours, compiled(programs.forward(f), x), 2)
    both = {ours: run.time(plan.GRADIENT, ours, compiled(programs.gradient(f), x), 8)}
    plain = programs.gradient(programs.peer(PEERS[PEER]))
    both[PEER] = run.time(plan.GRADIENT, PEER, compiled(plain, x), plan.KEEPS)
    return 0 if run.check(both) else 1


if __name__ == "__main__":
    sys.exit(main())
