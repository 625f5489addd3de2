"""A row for a TPU program: compiled, its schedule followed, the cycles summed."""

import os
import shutil
import sys
from collections.abc import Iterable
from typing import Any

from bench import rows
from bench.tpu.chips import CHIPS
from bench.tpu.compile import Compiled, Job, compile_elsewhere
from bench.tpu.model import Operation, operations
from bench.tpu.programs import ProgramError
from bench.tpu.report import NOTE


def python_for(program: str, chosen: str | None = None) -> str:
    """The Python that a program is built with.

    Raises:
        ProgramError: tokamax's is not given.
    """
    if chosen:
        if not shutil.which(chosen):
            raise ProgramError(f"no Python at {chosen}")
        return chosen
    if not program.startswith("tokamax"):
        return sys.executable
    path = os.environ.get("TOKAMAX_PYTHON", "")
    if program == "tokamax-backward":
        path = os.environ.get("TOKAMAX_BACKWARD_PYTHON", path)
    if not path or not shutil.which(path):
        raise ProgramError(
            f"{program} needs tokamax: set TOKAMAX_PYTHON to the Python of an "
            "environment with `pip install tokamax==0.0.17`"
        )
    return path


def predict(
    job: Job,
    python: str | None = None,
    scalars: dict[int, list[int]] | None = None,
) -> tuple[rows.Row, list[Operation]]:
    """A row for a program, and its operations.

    Raises:
        ProgramError, ScheduleError: one line says why there is no prediction.
    """
    return follow(job, compile_elsewhere(job, python_for(job.program, python)), scalars)


def follow(
    job: Job, compiled: Compiled, scalars: dict[int, list[int]] | None = None
) -> tuple[rows.Row, list[Operation]]:
    """As `predict`, of what is compiled already."""
    facts, chip = compiled.facts, CHIPS[job.generation]
    known = {int(k): v for k, v in facts["scalars"].items()} | (scalars or {})
    done, skipped = operations(compiled.schedules, chip, known, facts["trips"])
    kernels = [one for one in done if one.pallas]
    others = [one for one in done if not one.pallas]
    executed = sum(one.calls * one.matmul_flop for one in done)
    useful = facts["flops"] or executed
    kernel_s = sum(one.calls * one.seconds for one in kernels)
    other_s = sum(one.calls * one.seconds for one in others)
    # The kernel with the most to do is the one that the columns describe.
    main = max(kernels, key=lambda one: one.calls * one.seconds)
    row = row_of(
        job,
        seconds=kernel_s + other_s,
        flops=useful or None,
        peak_tflops=chip.peak_tflops,
        compiler=facts["compiler"],
        kernel_ms=round(1e3 * kernel_s, 4),
        other_ms=round(1e3 * other_s, 4),
        not_timed=skipped,
        # What XLA expects of these; in no other number of the row.
        not_timed_ms=round(1e3 * _estimate(facts, skipped) / chip.hertz, 4),
        binds=main.binds,
        steps=main.steps,
        cycles_per_step=round(main.run.cycles / max(main.steps, 1)),
        bytes_per_step=round(main.hbm_bytes / len(main.runs) / max(main.steps, 1)),
        wait_pct=round(100 * main.run.wait / main.run.cycles, 2),
        hbm_ms=round(1e3 * main.transfer_cycles / chip.hertz, 4),
        matmul_flop_per_useful=round(executed / useful, 4) if useful else None,
        spills=sum(b.spills for b in main.run.blocks),
        temp_bytes=facts["temp_bytes"],
        argument_bytes=facts["argument_bytes"],
        output_bytes=facts["output_bytes"],
        **facts["notes"],
    )
    row["jax"] = facts["jax"]
    return row, done


def row_of(job: Job, **more: Any) -> rows.Row:
    """A row about a program, whether there is a prediction or not."""
    return rows.row(
        "TPU schedule",
        job.program,
        T=job.T,
        D=job.D,
        V=job.V,
        dtype=job.dtype,
        device=f"TPU {job.generation}, ahead of time",
        what=NOTE,
        options=job.options,
        **more,
    )


def _estimate(facts: dict[str, Any], names: Iterable[str]) -> int:
    """The cycles of operations, by XLA's own estimate; 0 of one that has none."""
    runs, cycles = facts["trips"], facts["estimated_cycles"]
    return sum(runs.get(name, 1) * cycles.get(name, 0) for name in names)
