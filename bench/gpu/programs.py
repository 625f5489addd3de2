"""The JAX programs that are measured: the op, plain JAX, and the bare product."""

import functools
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bench.gpu import plan
from bench.gpu.timing import Call, Times, clocks, take_turns
from bench.gpu.worker import Context, Subject, why
from dpo_kernels import token_logprobs
from dpo_kernels.op.backends import supported_backends
from dpo_kernels.op.compilation import Compiler
from dpo_kernels.op.devices import traced_device
from dpo_kernels.op.tiling import Problem

BETA = 0.1
OURS = "dpo_kernels"
Logprobs = Callable[..., Array]  # of hidden, head, targets and num_valid


class Inputs(NamedTuple):
    """What every candidate is given; the reference is the DPO loss's."""

    hidden: Array
    head: Array
    targets: Array
    dlogprob: Array  # a cotangent for each token, of either sign
    num_valid: Array


@functools.partial(jax.jit, static_argnums=0)
def make_inputs(shape: plan.Shape, seed: int | Array = 0) -> Inputs:
    """Logits of standard deviation about 1, in bfloat16; the same in every process."""
    T, D, V = shape
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (T, D), jnp.float32)
    head = jax.random.normal(keys[1], (V, D), jnp.float32) * D**-0.5
    return Inputs(
        hidden=hidden.astype(jnp.bfloat16),
        head=head.astype(jnp.bfloat16),
        targets=jax.random.randint(keys[2], (T,), 0, V, jnp.int32),
        dlogprob=jax.random.normal(keys[3], (T,), jnp.float32),
        num_valid=jnp.int32(T),
    )


def backends(shape: plan.Shape) -> tuple[str, ...]:
    """What can do bfloat16 at this shape here, the fastest first."""
    T, D, V = shape
    return supported_backends(
        Problem(
            T=T,
            D=D,
            V=V,
            dtype=jnp.dtype(jnp.bfloat16),
            workspace_bytes=plan.WORKSPACE,
            device=traced_device(),
            ragged=False,
        )
    )


def matmul(inputs: Inputs) -> Array:
    """The logits in bfloat16, as a bare product leaves them."""
    return jnp.einsum("TD,VD->TV", inputs.hidden, inputs.head)


def ours(implementation: str, workspace: int, padded: bool = False) -> Logprobs:
    """The op on one backend."""

    def call(hidden: Array, head: Array, targets: Array, num_valid: Array) -> Array:
        return token_logprobs(
            hidden,
            head,
            targets,
            num_valid=num_valid if padded else None,
            workspace_bytes=workspace,
            implementation=implementation,
        ).logprob

    return call


def peer(f: Callable[..., Array]) -> Logprobs:
    """Plain JAX, which knows nothing of padding."""
    return lambda hidden, head, targets, num_valid: f(hidden, head, targets)


def forward(f: Logprobs) -> Callable[[Inputs], Array]:
    """2TDV."""
    return lambda x: f(x.hidden, x.head, x.targets, x.num_valid)


def gradient(f: Logprobs) -> Callable[[Inputs], Any]:
    """Log-probabilities and the gradients of hidden and head, 8TDV or 6TDV."""

    def call(x: Inputs) -> Any:
        def loss(hidden: Array, head: Array) -> tuple[Array, Array]:
            logprob = f(hidden, head, x.targets, x.num_valid)
            return (logprob * x.dlogprob.astype(logprob.dtype)).sum(), logprob

        value_and_grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
        (_, logprob), grads = value_and_grad(x.hidden, x.head)
        return logprob, grads

    return call


def dpo_gradient(f: Logprobs, sequences: int) -> Callable[[Inputs, Inputs], Any]:
    """The sigmoid loss of 8 pairs and its gradients; the reference has a head too.

    10TDV, or 8TDV where the policy's logits are kept. Chosen sequences come first.
    """

    def call(x: Inputs, reference: Inputs) -> Any:
        def logps(hidden: Array, head: Array) -> Array:
            logprob = f(hidden, head, x.targets, x.num_valid)
            return logprob.reshape(sequences, -1).sum(axis=1)

        def loss(hidden: Array, head: Array) -> Array:
            ref = lax.stop_gradient(logps(reference.hidden, reference.head))
            chosen, rejected = jnp.split(logps(hidden, head) - ref, 2)
            return -jax.nn.log_sigmoid(BETA * (chosen - rejected)).mean()

        return jax.value_and_grad(loss, (0, 1))(x.hidden, x.head)

    return call


@dataclass(frozen=True, kw_only=True)
class Program:
    """One candidate: what to compile, what to run it on, what to report."""

    subject: Subject
    function: Callable[..., Any]
    inputs: tuple[Inputs, ...]
    flops: int  # over TDV
    goal: plan.Goal | None = None
    # Judges the milliseconds or, by default, the share of R in percent.
    goal_of_ms: bool = False
    note: str = ""


def abstract(shape: plan.Shape, _: int = 0) -> Inputs:
    """As `make_inputs`, without the values: enough to compile for."""
    return jax.eval_shape(lambda: make_inputs(shape))


Futures = dict[Subject, Future]


def start(context: Context, use: Compiler, programs: Iterable[Program]) -> Futures:
    """Have those compiled that still need their row."""
    return {
        one.subject: use.submit(one.function, *one.inputs)
        for one in programs
        if context.wanted(one.subject)
    }


def wait(context: Context, futures: Futures) -> dict[Subject, jax.stages.Compiled]:
    """The programs; one that cannot be compiled gets a row that says why."""
    found = {}
    for subject, future in futures.items():
        context.trying(subject)
        error = future.exception()
        if error is None:
            found[subject] = future.result()
        else:
            context.row(subject, error=why(error))
    return found


Extra = Callable[[Program, Any], Mapping[str, Any]]


def measure(
    context: Context,
    programs: Iterable[Program],
    compiled: Mapping[Subject, jax.stages.Compiled],
    extra: Extra = lambda program, out: {},
) -> dict[Subject, Times]:
    """Time all in turns and hand over their rows; `extra` adds fields from results.

    The row of the bare product, if there is one, is what the others' shares are of.
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
