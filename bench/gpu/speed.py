"""The op and plain JAX at real shapes, in turns with the bare product.

    R            XLA's hidden @ head.T in bfloat16, 2TDV, in the same rounds
    forward      2TDV
    gradient     forward and gradient: 8TDV; 6TDV where the workspace keeps the logits

`pct_peak` is a row's share of R. Gradients are compared with `truth.py`'s. What the run
is for, every backend at the main shape, has its rows before anything else is compiled.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bench.device import plan, programs
from bench.device.programs import OURS, Inputs
from bench.device.subject import Subject
from bench.device.timing import Times
from bench.gpu import goals, shared, sizes
from bench.gpu.measure import measure
from bench.gpu.pool import Pool, Program
from bench.gpu.truth import REFERENCE_SEED
from bench.gpu.worker import Context
from bench.op.peers import CHUNKED, PEERS

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
            goal=goals.FORWARD_GOALS.get(name),
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
            goal=goals.GRADIENT_GOAL if name == found[0] else None,
        )


def more_candidates(
    context: Context, shape: plan.Shape, x: Inputs, reference: Inputs
) -> Iterator[Program]:
    """Of the main shape: larger workspaces, padding, plain JAX, the DPO loss."""
    yield bare(shape, x)
    fastest = programs.backends(shape)[0]
    keeping = context.plan.keeping
    for workspace in keeping:
        yield program(
            plan.GRADIENT,
            f"{OURS} {fastest}",
            shape,
            programs.gradient(programs.ours(fastest, workspace)),
            x,
            setting=plan.mib(workspace),
            flops=plan.KEEPS,
            goal=goals.KEEPING_GOAL if workspace == keeping[0] else None,
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
    for workspace in (plan.WORKSPACE, keeping[0]):
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

    FILES = {
        plan.GRADIENT: ("dhidden", "dhead"),
        plan.DPO: ("dpo_dhidden", "dpo_dhead"),
    }

    def __init__(self, context: Context, shape: plan.Shape):
        self._work, self._shape = context.work, shape
        self._truth: dict[str, list[Array]] = {}

    def _load(self, op: str) -> list[Array]:
        """Once, when it is first asked for: some gigabytes of the device."""
        if op not in self._truth:
            names = self.FILES.get(op, ())
            arrays = [shared.load(self._work, self._shape, name) for name in names]
            self._truth[op] = [jnp.asarray(x) for x in arrays if x is not None]
        return self._truth[op]

    def __call__(self, program: Program, out: Any) -> Mapping[str, Any]:
        """The larger of the two gradients' errors."""
        truth = self._load(program.subject.op)
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
    goal, ratio = goals.PADDED_GOAL, half / full
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
            goal=goals.SMALL_GOAL if name == found[0] else None,
        )


Make = Callable[[plan.Shape, int], Inputs]
Task = Callable[[Make], Iterable[Program]]  # of `make_inputs` or `abstract`


def tasks(context: Context) -> dict[str, Task]:
    """What is compiled, and then timed, together: the most telling first."""
    size = context.plan
    main = size.main

    def of(candidates: Callable[..., Iterable[Program]], shape: plan.Shape) -> Task:
        return lambda make: candidates(shape, make(shape, 0))

    def rest(make: Make) -> Iterable[Program]:
        return more_candidates(context, main, make(main, 0), make(main, REFERENCE_SEED))

    def other(shape: plan.Shape) -> Task:
        def every(make: Make) -> Iterable[Program]:
            x = make(shape, 0)
            yield from main_candidates(shape, x)
            if shape in size.with_truth:
                yield from plain_candidates(shape, x)

        return every

    found = {f"speed {main}": of(main_candidates, main), f"more of {main}": rest}
    for shape in size.small:
        found[f"speed {shape}"] = of(small_candidates, shape)
    for shape in size.shapes[1:]:
        found[f"speed {shape}"] = other(shape)
    return found


def say_what_is_missing(context: Context) -> None:
    """A row for each of the GPU's backends that cannot run here."""
    T, D, V = shape = context.plan.main
    for name in sizes.BACKENDS:
        about = {"op": plan.FORWARD, "implementation": f"{OURS} {name}"}
        subject = Subject(**about, T=T, D=D, V=V)
        reason = programs.missing(shape, name)
        if reason is not None and context.wanted(subject):
            context.row(subject, missing=reason)


def run(context: Context) -> None:
    """One task after the other: what is late costs no row of what was before it."""
    say_what_is_missing(context)
    todo, pool = tasks(context), Pool(context)
    for name in context.tasks(todo):
        compiled = pool.compile(todo[name](programs.abstract))
        if compiled:
            here = todo[name](programs.make_inputs)
            shape = next(iter(compiled))
            errors = Errors(context, (shape.T, shape.D, shape.V))
            padding_ratio(context, measure(context, here, compiled, errors))
    pool.close()
