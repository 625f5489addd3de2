"""The GPU's race and memory checkers over each backend, at shapes that fill no block.

python -m bench.gpu.sanitizer NAME      what is checked, by itself
"""

import os
import re
import shutil
import subprocess
import sys
from typing import Any

from bench import processes
from bench.device import plan
from bench.device.subject import Subject
from bench.gpu import sizes
from bench.gpu.worker import Context

# T, D, V, and rows that count: none that a block divides, few blocks and several.
SHAPES = ((129, 64, 1000, None), (300, 192, 1000, 200))
# First, where warpgroups share memory: what an interpreter cannot check.
CHECKS = tuple(
    (name, tool) for name in sizes.BACKENDS for tool in ("racecheck", "memcheck")
)
LEAST_S = 5.0  # of the time left, under which no further check is begun
ERRORS = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


def loss_of(name: str, num_valid: int | None) -> Any:
    """Everything that a backend can do, in one number."""
    from dpo_kernels import token_logprobs

    def loss(hidden: Any, head: Any, bias: Any, targets: Any) -> Any:
        out = token_logprobs(
            hidden,
            head,
            targets,
            bias=bias,
            softcap=5.0,
            num_valid=num_valid,
            stats=("entropy", "collision", "mean_logit", "top1"),
            implementation=name,
        )
        return out.logprob.sum()

    return loss


def work(name: str) -> None:
    """Forward and gradient of one backend."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    for T, D, V, num_valid in SHAPES:
        hidden = jnp.asarray(rng.normal(size=(T, D)), jnp.bfloat16)
        head = jnp.asarray(rng.normal(size=(V, D)) / D**0.5, jnp.bfloat16)
        bias = jnp.asarray(rng.normal(size=V), jnp.bfloat16)
        targets = jnp.asarray(rng.integers(0, V, T), jnp.int32)
        gradient = jax.jit(jax.grad(loss_of(name, num_valid), (0, 1, 2)))
        found = gradient(hidden, head, bias, targets)
        assert all(bool(jnp.isfinite(x).all()) for x in found), name
    print("finished", flush=True)


def count_errors(text: str) -> int | None:
    """Of the checker's last line; None where it never came to it."""
    found = ERRORS.findall(text)
    if not found or "finished" not in text:
        return None
    return sum(int(a or b) for a, b in found)


def check(context: Context, checker: str | None, tool: str, name: str) -> None:
    """One row."""
    T, D, V, _ = SHAPES[0]
    subject = Subject(
        op=plan.SANITIZER, implementation=name, T=T, D=D, V=V, setting=tool
    )
    if not context.wanted(subject) or context.seconds_left() < LEAST_S:
        return
    if checker is None:
        context.row(subject, missing="compute-sanitizer is not installed")
        return
    context.trying(subject)
    words = [checker, "--tool", tool, "--print-limit", "5"]
    words += processes.command("bench.gpu.sanitizer", [name])
    # XLA's own trials of products are none of our business, and many.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    try:
        with context.pulse:
            done = processes.run(words, {"XLA_FLAGS": flags}, context.seconds_left())
    except subprocess.TimeoutExpired:
        context.row(subject, unfinished="no time was left")
        return
    print(done.stdout, done.stderr, flush=True)
    errors = count_errors(done.stdout + done.stderr)
    if errors is None:
        context.row(subject, unfinished=f"{tool} gave no summary; see the log")
    else:
        context.row(subject, errors_found=errors, passed=errors == 0)


def run(context: Context) -> None:
    """A task for each backend and tool."""
    checker = shutil.which("compute-sanitizer")
    checks = {f"{tool} of {name}": (name, tool) for name, tool in CHECKS}
    if context.rehearse:
        work("xla")
        checks = {"memcheck of xla": ("xla", "memcheck")}
    for task in context.tasks(checks):
        name, tool = checks[task]
        check(context, checker, tool, name)


if __name__ == "__main__":
    work(sys.argv[1])
