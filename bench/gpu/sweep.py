"""Time and memory against V and against T, for the plots; ours and plain JAX."""

from collections.abc import Iterator

from bench.gpu import plan, programs
from bench.gpu.programs import Inputs, Program
from bench.gpu.speed import plain_candidates, program
from bench.gpu.worker import Context
from dpo_kernels.op.compilation import Compiler


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
        use = Compiler()
        futures = programs.start(
            context, use, candidates(shape, programs.abstract(shape))
        )
        compiled = programs.wait(context, futures)
        use.close()
        here = candidates(shape, programs.make_inputs(shape))
        programs.measure(context, here, compiled)
