"""The compilations of a section: each program once, with a sign of life meanwhile."""

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jax

from bench.device import plan
from bench.device.programs import Inputs
from bench.device.subject import Subject, why
from bench.gpu.goals import Goal
from bench.gpu.worker import Context, Pulse
from dpo_kernels.op.compilation import THREADS, Compiler


@dataclass(frozen=True, kw_only=True)
class Program:
    """One candidate: what to compile, what to run it on, what to report."""

    subject: Subject
    function: Callable[..., Any]
    inputs: tuple[Inputs, ...]
    flops: int  # over TDV
    goal: Goal | None = None
    # Judges the milliseconds or, by default, the share of R in percent.
    goal_of_ms: bool = False
    note: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for candidates that differ in the values of their inputs alone."""
        leaves = jax.tree.leaves(self.inputs)
        return self.function, *((x.shape, jax.numpy.dtype(x.dtype)) for x in leaves)


class PulsingCompiler(Compiler):
    """Keeps the pulse as long as a program is being compiled: slow is not hung.

    A device that hangs meanwhile is noticed when the compilations are through.
    """

    def __init__(self, pulse: Pulse, threads: int = THREADS):
        super().__init__(threads)
        self._pulse = pulse

    def submit(self, call: Callable, *shapes: Any, x64: bool = False) -> Future:
        """As `Compiler.submit`."""
        self._pulse.begin()
        future = super().submit(call, *shapes, x64=x64)
        future.add_done_callback(lambda _: self._pulse.end())
        return future


class Pool:
    """Compiles what candidates need; what was compiled for one serves its like."""

    def __init__(self, context: Context):
        self._context = context
        self._use = PulsingCompiler(context.pulse)
        self._futures: dict[tuple[Any, ...], Future] = {}

    def compile(self, programs: Iterable[Program]) -> dict[Subject, Any]:
        """Those that still need their row, and the product that they are set beside.

        Returns when nothing is being compiled any more, so that times are taken in
        quiet. One that cannot be compiled gets a row that says why.
        """
        every = list(programs)
        wanted = [one for one in every if self._context.wanted(one.subject)]
        if wanted:
            wanted += [one for one in every if one.subject.op == plan.MATMUL]
        futures = {one.subject: self._future(one) for one in wanted}
        found = {}
        for subject, future in futures.items():
            self._context.trying(subject)
            error = future.exception()
            if error is None:
                found[subject] = future.result()
            else:
                self._context.row(subject, error=why(error))
        return found

    def _future(self, one: Program) -> Future:
        if one.key not in self._futures:
            self._futures[one.key] = self._use.submit(one.function, *one.inputs)
        return self._futures[one.key]

    def close(self) -> None:
        """Let go of the programs."""
        self._use.close()
        self._futures.clear()
