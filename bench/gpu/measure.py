"""Candidates timed in turns, and their rows."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from bench.device import plan
from bench.device.subject import Subject
from bench.device.timing import Call, Times, take_turns
from bench.gpu.clocks import clocks
from bench.gpu.pool import Program
from bench.gpu.worker import Context

Extra = Callable[[Program, Any], Mapping[str, Any]]


def measure(
    context: Context,
    programs: Iterable[Program],
    compiled: Mapping[Subject, jax.stages.Compiled],
    extra: Extra = lambda program, out: {},
) -> dict[Subject, Times]:
    """Time all in turns and hand over their rows; `extra` adds fields from results.

    Shares are of the bare product, which has one row however often it is measured.
    """
    ready = {one.subject: one for one in programs if one.subject in compiled}
    if not ready:
        return {}
    fields = {}
    for subject, one in ready.items():
        context.trying(subject)
        fields[subject] = dict(extra(one, compiled[subject](*one.inputs)))

    def call(one: Program) -> Call:
        return lambda: compiled[one.subject](*one.inputs)

    calls = {subject: call(one) for subject, one in ready.items()}
    block = jax.block_until_ready
    times = take_turns(calls, block, context.plan, context.trying)
    busy = clocks(next(iter(calls.values())), block)
    peak = peak_tflops(ready, times)
    for subject, one in ready.items():
        if not context.wanted(subject):
            continue
        more = busy | fields[subject]
        hand_over(context, one, compiled[subject], times[subject], peak, more)
    return times


def peak_tflops(
    ready: Mapping[Subject, Program], times: Mapping[Subject, Times]
) -> float | None:
    """R, the bare product's TFLOP/s in these very rounds; None where it is not in."""
    for subject, one in ready.items():
        if subject.op == plan.MATMUL:
            return flops(one) / times[subject].median / 1e12
    return None


def flops(program: Program) -> int:
    """Of one call."""
    subject = program.subject
    return program.flops * subject.T * subject.D * subject.V


def hand_over(
    context: Context,
    program: Program,
    compiled: jax.stages.Compiled,
    times: Times,
    peak: float | None,
    extras: Mapping[str, Any],
) -> None:
    """One row."""
    memory = compiled.memory_analysis()
    fields: dict[str, Any] = {
        "seconds": times.median,
        "flops": flops(program),
        "formula": f"{program.flops}TDV",
        "peak_tflops": peak,
        "peak_bytes": memory.peak_memory_in_bytes if memory else None,
        "temp_bytes": memory.temp_size_in_bytes if memory else None,
        "device": jax.devices()[0].device_kind,
        **times.fields(),
        **extras,
    }
    if program.note:
        fields["note"] = program.note
    goal = program.goal
    if goal is not None and (peak is not None or program.goal_of_ms):
        share = None if peak is None else flops(program) / times.median / 1e10 / peak
        value = 1e3 * times.median if program.goal_of_ms else share
        assert value is not None, "a goal of R needs the bare product in the rounds"
        fields |= {"goal": goal.text, "met": goal.met(value)}
    context.row(program.subject, **fields)
