"""Time and memory against V and against T, for the plots; ours and plain JAX."""

from collections.abc import Iterator

from bench.device import plan, programs
from bench.device.programs import Inputs
from bench.gpu.measure import measure
from bench.gpu.pool import Pool, Program
from bench.gpu.speed import plain_candidates, program
from bench.gpu.worker import Context


def candidates(shape: plan.Shape, x: Inputs) -> Iterator[Program]:
    """The fastest of ours, and plain JAX."""
    fastest = programs.backends(shape)[0]
    yield program(
        plan.GRADIENT,
        f"{programs.OURS} {fastest}",
        shape,
        programs.gradient(programs.ours(fastest, plan.WORKSPACE)),
        x,
        setting=plan.mib(plan.WORKSPACE),
    )
    yield from plain_candidates(shape, x)


def run(context: Context) -> None:
    """A task for each shape; the next one compiles only when this one is timed."""
    tasks = {f"sweep {shape}": shape for shape in context.plan.sweep}
    for name in context.tasks(tasks):
        shape = tasks[name]
        pool = Pool(context)
        compiled = pool.compile(candidates(shape, programs.abstract(shape)))
        if compiled:
            measure(context, candidates(shape, programs.make_inputs(shape)), compiled)
        pool.close()
