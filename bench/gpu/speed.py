"""The op and plain JAX at real shapes, in turns with the bare product.

    R            XLA's hidden @ head.T in bfloat16, 2TDV, in the same rounds
    forward      2TDV
    gradient     forward and gradient: 8TDV; 6TDV where the workspace keeps the logits

`pct_peak` is a row's share of R. Gradients are compared with `truth.py`'s.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bench.gpu import plan, programs, shared
from bench.gpu.programs import OURS, Inputs, Program, start, wait
from bench.gpu.timing import Times
from bench.gpu.truth import REFERENCE_SEED
from bench.gpu.worker import Context, Subject
from bench.op.peers import CHUNKED, PEERS
from dpo_kernels.op.compilation import Compiler

ALL_ROWS, HALF = "num_valid is T", "num_valid is T/2"


def program(
    op: str,
    implementation: str,
    shape: plan.Shape,
    function: Any,
    *inputs: Inputs,
    setting: str = "",
    flops: int | None = None,
    **rest: Any,
) -> Program:
    """A candidate at a shape."""
    T, D, V = shape
    subject = Subject(
        op=op, implementation=implementation, T=T, D=D, V=V, setting=setting
    )
    flops = plan.FLOPS[op] if flops is None else flops
    return Program(
        subject=subject, function=function, inputs=inputs, flops=flops, **rest
    )


def bare(shape: plan.Shape, x: Inputs) -> Program:
    """What R is measured by."""
    return program(plan.MATMUL, "XLA", shape, programs.matmul, x)


def main_candidates(shape: plan.Shape, x: Inputs) -> Iterator[Program]:
    """Every backend, forward and gradient."""
    yield bare(shape, x)
    setting = plan.mib(plan.WORKSPACE)
    found = programs.backends(shape)
    for name in found:
        f = programs.ours(name, plan.WORKSPACE)
        yield program(
            plan.FORWARD,
            f"{OURS} {name}",
            shape,
            programs.forward(f),
            x,
            setting=setting,
            goal=plan.FORWARD_GOALS.get(name),
        )
    for name in found:
        f = programs.ours(name, plan.WORKSPACE)
        yield program(
            plan.GRADIENT,
            f"{OURS} {name}",
            shape,
            programs.gradient(f),
            x,
            setting=setting,
            goal=plan.GRADIENT_GOAL if name == found[0] else None,
        )


def more_candidates(
    context: Context, shape: plan.Shape, x: Inputs, reference: Inputs
) -> Iterator[Program]:
    """Of the main shape: larger workspaces, padding, plain JAX, the DPO loss."""
    fastest = programs.backends(shape)[0]
    for workspace in plan.KEEPING:
        yield program(
            plan.GRADIENT,
            f"{OURS} {fastest}",
            shape,
            programs.gradient(programs.ours(fastest, workspace)),
            x,
            setting=plan.mib(workspace),
            flops=plan.KEEPS,
            goal=plan.KEEPING_GOAL if workspace == plan.KEEPING[0] else None,
            goal_of_ms=True,
        )
    padded = programs.ours(fastest, plan.WORKSPACE, padded=True)
    half = x._replace(num_valid=jnp.int32(shape[0] // 2))
    for setting, inputs in ((ALL_ROWS, x), (HALF, half)):
        yield program(
            plan.GRADIENT,
            f"{OURS} {fastest}",
            shape,
            programs.gradient(padded),
            inputs,
            setting=setting,
            note="tflops counts the padding rows too" if inputs is half else "",
        )
    yield from plain_candidates(shape, x)
    for workspace in (plan.WORKSPACE, plan.KEEPING[0]):
        f = programs.ours(fastest, workspace)
        yield program(
            plan.DPO,
            f"{OURS} {fastest}",
            shape,
            programs.dpo_gradient(f, context.plan.sequences),
            x,
            reference,
            setting=plan.mib(workspace),
            flops=10 if workspace == plan.WORKSPACE else 8,
        )


def plain_candidates(shape: plan.Shape, x: Inputs) -> Iterator[Program]:
    """Plain JAX, whose logits are kept, or in chunks that are computed again."""
    for name, f in (PEERS | CHUNKED).items():
        yield program(
            plan.GRADIENT,
            name,
            shape,
            programs.gradient(programs.peer(f)),
            x,
            flops=8 if name in CHUNKED else plan.KEEPS,
        )


@jax.jit
def distances(x: Any, truth: Any) -> Any:
    """For each leaf |x - truth| / |truth|, by the 2-norm."""

    def leaf(x: Array, truth: Array) -> Array:
        a, b = x.astype(jnp.float32), truth.astype(jnp.float32)
        return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())

    return jax.tree.map(leaf, x, truth)


class Errors:
    """Of a shape's gradients; says nothing where there is no truth."""

    def __init__(self, context: Context, shape: plan.Shape):
        def load(*names: str) -> list[Array]:
            arrays = [shared.load(context.work, shape, name) for name in names]
            return [jnp.asarray(x) for x in arrays if x is not None]

        self._truth = {
            plan.GRADIENT: load("dhidden", "dhead"),
            plan.DPO: load("dpo_dhidden", "dpo_dhead"),
        }

    def __call__(self, program: Program, out: Any) -> Mapping[str, Any]:
        """The larger of the two gradients' errors."""
        truth = self._truth.get(program.subject.op)
        if not truth or program.subject.setting == HALF:
            return {}
        found = distances(list(out[1]), truth)
        return {"gradient_error": float(f"{max(map(float, found)):.3g}")}


def padding_ratio(context: Context, times: Mapping[Subject, Times]) -> None:
    """Half the rows over all of them, by the same program."""
    seconds = {one.setting: (one, found.median) for one, found in times.items()}
    if ALL_ROWS not in seconds or HALF not in seconds:
        return
    (some, full), (_, half) = seconds[ALL_ROWS], seconds[HALF]
    goal, ratio = plan.PADDED_GOAL, half / full
    context.row(
        replace(some, op="half the rows over all", setting=""),
        ratio=round(ratio, 3),
        device=jax.devices()[0].device_kind,
        goal=goal.text,
        met=goal.met(ratio),
    )


def small_candidates(shape: plan.Shape, x: Inputs) -> Iterator[Program]:
    """Few rows: reading the head and writing its gradient begin to count."""
    yield bare(shape, x)
    found = programs.backends(shape)
    for name in found[:2]:
        yield program(
            plan.GRADIENT,
            f"{OURS} {name}",
            shape,
            programs.gradient(programs.ours(name, plan.WORKSPACE)),
            x,
            setting=plan.mib(plan.WORKSPACE),
            goal=plan.SMALL_GOAL if name == found[0] else None,
        )


Make = Callable[[plan.Shape, int], Inputs]


def candidates(context: Context, shape: plan.Shape, make: Make) -> list[Program]:
    """All of a shape; `make` gives inputs, or what can be compiled for."""
    sizes, x = context.plan, make(shape, 0)
    if shape in sizes.small:
        return list(small_candidates(shape, x))
    found = list(main_candidates(shape, x))
    if shape == sizes.main:
        reference = make(shape, REFERENCE_SEED)
        found += more_candidates(context, shape, x, reference)
    elif shape in sizes.with_truth:
        found += plain_candidates(shape, x)
    return found


def run(context: Context) -> None:
    """A task for each shape: the main one, few rows, the others.

    All are compiled before the first is timed, so that times are taken in quiet.
    """
    sizes, use = context.plan, Compiler()
    shapes = (sizes.main, *sizes.small, *sizes.shapes[1:])
    tasks = {f"speed {shape}": shape for shape in shapes}
    futures = {
        name: start(context, use, candidates(context, shape, programs.abstract))
        for name, shape in tasks.items()
        if not context.is_done(name)
    }
    compiled = {name: wait(context, some) for name, some in futures.items()}
    for name in context.tasks(tasks):
        shape = tasks[name]
        here = candidates(context, shape, programs.make_inputs)
        errors = Errors(context, shape)
        times = programs.measure(context, here, compiled.pop(name), errors)
        padding_ratio(context, times)
