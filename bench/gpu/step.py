"""A whole DPO step of a Llama of 1.4 billion parameters, with our head and plain JAX's.

Policy, reference, backward and AdamW, in bfloat16 with float32 parameters. Each side is
a process of its own, so that its peak memory is its own; their steps take turns.

    head_share   time of the head alone, over the step's: policy forward and gradient
                 and reference forward at the step's rows, D and V, timed by itself in
                 the same process

Plain JAX has the head at every token, prompts included, as usual trainers do; ours at
the scored ones. Its rows are `T`.
"""

import functools
import multiprocessing
import statistics
from concurrent import futures
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench import processes
from bench.device import plan
from bench.device.subject import Subject
from bench.gpu.clocks import clocks
from bench.gpu.worker import Context
from bench.step import candidates as step_candidates
from bench.step.candidates import OURS, PICK, PLAIN, PLAIN_OPTAX, Workload

SIDES = (OURS, PLAIN, PLAIN_OPTAX)
REAL = Workload(
    vocab=128256, layers=16, hidden=2048, prompt=256, completion=256, dtype="bfloat16"
)
REHEARSAL = Workload(
    vocab=301,
    layers=1,
    hidden=128,
    pairs=2,
    prompt=5,
    completion=32,
    dtype="bfloat16",
)
BEAT_S = 5.0
ITERATIONS = 5  # of the head alone between two waits
STEP, HEAD, STOP = "step", "head", "stop"


def head_shape(name: str, workload: Workload) -> plan.Shape:
    """Of the head's operands in one step."""
    return workload.head_rows(name), workload.hidden, workload.vocab


def start_heads(name: str, workload: Workload) -> list[Future]:
    """The policy's head with its gradients, and the reference's, being compiled."""
    import jax

    from bench.device import programs
    from dpo_kernels import token_logprobs
    from dpo_kernels.op.compilation import Compiler
    from engine.training.metrics import STATS

    def op(stats: tuple[str, ...]) -> programs.Logprobs:
        def ours(hidden: Any, head: Any, targets: Any, num_valid: Any) -> Any:
            out = token_logprobs(
                hidden, head, targets, num_valid=num_valid, stats=stats
            )
            return out.logprob

        def plain(hidden: Any, head: Any, targets: Any, _: Any) -> Any:
            logits = jax.numpy.einsum("RSD,VD->RSV", hidden[None], head)
            return PICK[name](logits, targets[None])[0]

        return ours if name == OURS else plain

    x, use = programs.abstract(head_shape(name, workload)), Compiler()
    functions = (programs.gradient(op(STATS)), programs.forward(op(())))
    return [use.submit(f, x) for f in functions]


def head_seconds(name: str, workload: Workload, heads: list[Future]) -> float:
    """Of the head alone in one step; the median of three, for each program."""
    import jax

    from bench.device.programs import make_inputs
    from bench.device.timing import seconds_of

    x, total = make_inputs(head_shape(name, workload)), 0.0
    for head in heads:
        program = head.result()
        call = functools.partial(program, x)
        jax.block_until_ready(call())
        found = [seconds_of(call, jax.block_until_ready, ITERATIONS) for _ in range(3)]
        total += statistics.median(found)
    return total


def peak_in_use() -> int | None:
    """Bytes of the device that this process had in use at most."""
    import jax

    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


def run_side(connection: Connection, name: str, workload: Workload, lock: Path) -> None:
    """A process's whole life: compile, then whatever it is asked for."""
    import jax

    # XLA keeps its trials of products apart within a process, not among several: what
    # it times beside another process's work it may choose wrongly.
    with processes.alone(lock):
        heads = start_heads(name, workload)
        candidate = step_candidates.make_candidate(name, workload)
        futures.wait(heads)  # so that nothing compiles beside a step that is timed
    connection.send(
        {
            "temp_bytes": candidate.temporaries,
            "compile_s": round(candidate.compile_seconds, 1),
            "device": jax.devices()[0].device_kind,
        }
    )
    while (asked := connection.recv()) != STOP:
        if asked == STEP:
            connection.send(candidate())
        else:
            # What the head takes by itself must not count as the step's.
            peak = peak_in_use()
            seconds = head_seconds(name, workload, heads)
            connection.send({"peak_bytes": peak, "head_seconds": seconds})


class Side:
    """One process, seen from outside."""

    def __init__(self, context: Context, name: str, workload: Workload):
        self._context, self.subject = context, subject_of(name, workload)
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(
            target=run_side,
            args=(theirs, name, workload, context.work / "step.lock"),
            daemon=True,
        )
        self._process.start()
        theirs.close()
        self.alive = True

    def answer(self) -> dict[str, Any] | None:
        """What it sends next; None where it died or there is no time left."""
        try:
            while self.alive and self._context.seconds_left() > 0:
                self._context.trying(self.subject)  # a sign of life, too
                if self._connection.poll(BEAT_S):
                    return self._connection.recv()
        except EOFError:
            pass
        self.kill()
        return None

    def ask(self, word: str) -> dict[str, Any] | None:
        """Its answer to a request."""
        if self.alive:
            self._connection.send(word)
        return self.answer()

    def kill(self) -> None:
        """End it."""
        self.alive = False
        self._process.kill()


def subject_of(name: str, workload: Workload) -> Subject:
    """Of a side's row."""
    return Subject(
        op=plan.STEP,
        implementation=name,
        T=workload.head_rows(name),
        D=workload.hidden,
        V=workload.vocab,
        dtype=workload.dtype,
    )


def hand_over(
    context: Context, name: str, workload: Workload, found: dict[str, Any]
) -> None:
    """One side's row."""
    seconds = [one["wall"] for one in found["steps"]]
    step = statistics.median(seconds)
    head = found["head"]["head_seconds"]
    context.row(
        subject_of(name, workload),
        seconds=step,
        flops=workload.flops(name),
        peak_bytes=found["head"]["peak_bytes"],
        min_ms=round(1e3 * min(seconds), 2),
        rounds=len(seconds),
        head_ms=round(1e3 * head, 2),
        head_share=round(head / step, 3),
        layers=workload.layers,
        pairs=workload.pairs,
        length=workload.length,
        loss=found["loss"],
        **found["compiled"],
        **found["clocks"],
    )


def compare(context: Context, workload: Workload) -> None:
    """Start all sides, let them take turns, hand over the rows of those that live."""
    wanted = [n for n in SIDES if context.wanted(subject_of(n, workload))]
    sides = {name: Side(context, name, workload) for name in wanted}
    found: dict[str, dict[str, Any]] = {name: {"steps": []} for name in wanted}

    def lost(name: str, doing: str) -> None:
        late = context.seconds_left() <= 0
        reason = {"unfinished" if late else "error": f"gone while {doing}"}
        context.row(sides.pop(name).subject, **reason)

    for name in wanted:
        found[name]["compiled"] = sides[name].answer()
        if found[name]["compiled"] is None:
            lost(name, "compiling")
    # Only now: a step would disturb what another side still tries out.
    for name in list(sides):
        first = sides[name].ask(STEP)
        if first is None:
            lost(name, "at the first step")
        else:
            found[name]["loss"] = first["metrics"]["loss"]
    for _ in range(context.plan.rounds):
        for name in list(sides):
            one = sides[name].ask(STEP)
            if one is None:
                lost(name, "at a step")
            else:
                found[name]["steps"].append(one)
    for name in list(sides):
        busy = clocks()
        head = sides[name].ask(HEAD)
        if head is None:
            lost(name, "timing the head")
            continue
        found[name] |= {"head": head, "clocks": busy}
        hand_over(context, name, workload, found[name])
        sides[name].kill()


def run(context: Context) -> None:
    """One comparison."""
    workload = REHEARSAL if context.rehearse else REAL
    for _ in context.tasks(["step"]):
        compare(context, workload)
