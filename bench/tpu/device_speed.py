"""Times of the TPU kernels and of what stands beside them; see `bench.tpu.device`."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.errors import JaxRuntimeError

from bench import rows
from bench.device import plan
from bench.device import programs as op
from bench.device.subject import Subject, why
from bench.device.timing import Times, take_turns
from bench.op.peers import PEERS
from bench.tpu.compare import NAME as PREDICTIONS

IMPLEMENTATION = "pallas_tpu"
HALF = "half the rows padded"
# By the start of what a device calls itself; the longest that fits.
GENERATIONS = {
    "v5 lite": "v5e",
    "v5e": "v5e",
    "v5": "v5p",
    "v6": "v6e",
    "7": "7x",
}


def generation_of(kind: str) -> str:
    """`TPU v6 lite` -> v6e; "" for one that is not known."""
    name = kind.lower().removeprefix("tpu").strip()
    found = [key for key in GENERATIONS if name.startswith(key)]
    return GENERATIONS[max(found, key=len)] if found else ""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What is timed."""

    subject: Subject
    function: Callable[[op.Inputs], Any]
    inputs: op.Inputs
    formula: int  # FLOP over TDV, of the rows that are valid
    valid: int

    @property
    def flops(self) -> int:
        """Of one call."""
        return self.formula * self.valid * self.subject.D * self.subject.V


def candidates(shape: plan.Shape, inputs: op.Inputs) -> Iterator[Candidate]:
    """The bare product, ours (all rows, and half of them), plain JAX."""
    T, D, V = shape

    def one(what: str, name: str, function: Any, formula: int, valid: int = T):
        setting = HALF if valid < T else ""
        subject = Subject(op=what, implementation=name, T=T, D=D, V=V, setting=setting)
        given = inputs._replace(num_valid=jnp.int32(valid))
        return Candidate(
            subject=subject,
            function=function,
            inputs=given,
            formula=formula,
            valid=valid,
        )

    yield one(plan.MATMUL, "XLA", op.matmul, plan.FLOPS[plan.MATMUL])
    forms = {plan.FORWARD: op.forward, plan.GRADIENT: op.gradient}
    for what, form in forms.items():
        for valid in (T, T // 2):
            # One program, told how many rows count; what is predicted is the same.
            f = op.ours(IMPLEMENTATION, plan.WORKSPACE, padded=True)
            yield one(what, IMPLEMENTATION, form(f), plan.FLOPS[what], valid)
        for name, f in PEERS.items():
            formula = plan.KEEPS if what == plan.GRADIENT else plan.FLOPS[what]
            yield one(what, name, form(op.peer(f)), formula)


def predicted_ms(subject: Subject, kind: str) -> float | None:
    """From the compiler's schedule, of the committed rows; None where there is none."""
    if subject.implementation != IMPLEMENTATION:
        return None
    programs = ["forward"] + ["backward"] * (subject.op == plan.GRADIENT)
    total = 0.0
    for program in programs:
        found = [
            row["ms"]
            for row in rows.read(rows.RESULTS / f"{PREDICTIONS}.json")
            if row["implementation"] == program
            and row["device"].split(",")[0] == f"TPU {generation_of(kind)}"
            and all(row[x] == getattr(subject, x) for x in "TDV")
            and (row["valid"] < row["T"]) == bool(subject.setting)
        ]
        if not found:
            return None
        total += found[0]
    return float(f"{total:.4g}")


def _ready(function: Callable, inputs: op.Inputs) -> tuple[Any, str]:
    """The compiled program after one run, or why there is none."""
    try:
        compiled = jax.jit(function).lower(inputs).compile()
        jax.block_until_ready(compiled(inputs))
    except (JaxRuntimeError, NotImplementedError) as error:
        return None, why(error)
    return compiled, ""


def speed(shape: plan.Shape, sizes: plan.Plan) -> Iterator[rows.Row]:
    """A row for each candidate; the first, the bare product, is what R is."""
    kind = jax.devices()[0].device_kind
    every = list(candidates(shape, op.make_inputs(shape)))
    ready = {
        f: _ready(f, every[0].inputs) for f in dict.fromkeys(x.function for x in every)
    }
    programs = {one.subject: ready[one.function] for one in every}
    calls = {
        one.subject: functools.partial(programs[one.subject][0], one.inputs)
        for one in every
        if programs[one.subject][0] is not None
    }
    times = take_turns(calls, jax.block_until_ready, sizes, lambda _: None)
    peak = None
    for one in every:
        compiled, error = programs[one.subject]
        if one.subject.op == plan.MATMUL and compiled is not None:
            peak = one.flops / times[one.subject].median / 1e12
        fields: dict[str, Any] = (
            {"error": error} if error else _fields(one, compiled, times, kind)
        )
        subject = one.subject
        yield rows.row(
            subject.op,
            subject.implementation,
            T=subject.T,
            D=subject.D,
            V=subject.V,
            dtype=subject.dtype,
            device=kind,
            peak_tflops=peak,
            setting=subject.setting,
            **fields,
        )


def _fields(
    one: Candidate, compiled: Any, times: dict[Subject, Times], kind: str
) -> dict[str, Any]:
    took, memory = times[one.subject], compiled.memory_analysis()
    guess = predicted_ms(one.subject, kind)
    return {
        "seconds": took.median,
        "flops": one.flops,
        "formula": f"{one.formula}TDV",
        "temp_bytes": memory.temp_size_in_bytes if memory else None,
        "predicted_ms": guess,
        "measured_over_predicted": guess and float(f"{1e3 * took.median / guess:.4g}"),
        **took.fields(),
    }
