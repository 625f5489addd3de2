"""The account of a step on a target: memory, arithmetic, traffic, time; does it fit?

Memory is the compiler's own account (`memory_analysis()`): what a step is given and
returns, once where it is donated, and its temporaries. Of these the gradients are known
by themselves: float32, sharded as the parameters are; they are all there before the
first parameter changes, since their norm is.

Time is a roofline, not a measurement. Products, memory and communication each take what
they take at the makers' peak rates; where all overlap a step takes the longest of them
(`least_s`), where nothing does their sum (`most_s`). Real kernels reach 0.5 to 0.9 of
such peaks.
"""

import dataclasses
import math
import re
import time
from dataclasses import dataclass
from typing import Any

import jax

from engine.parallel.host_memory import on_host
from engine.parallel.sharding import FSDP, SEQUENCE
from engine.planning.hlo import parse
from engine.planning.steps import Step
from engine.planning.targets import Target
from engine.planning.traffic import Traffic, traffic_of
from engine.planning.work import PHASES, Work, work_of
from engine.training.compiler_options import known_options
from engine.training.memory import taken_by

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSALS = (
    # What a program needs in all, as libtpu says where that is more than there is.
    re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"),
    re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds"),
)


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes on a device throughout a step."""

    parameters: int  # those that are trained
    frozen: int  # the others, of an adapter's base
    optimizer: int
    reference: int
    batch: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of a step; see the module."""

    products_s: float
    memory_s: float
    communication_s: float
    exposed_s: float  # of communication, while nothing is computed

    @property
    def least_s(self) -> float:
        """Where everything overlaps."""
        return max(self.products_s, self.memory_s, self.communication_s)

    @property
    def most_s(self) -> float:
        """Where nothing does."""
        return self.products_s + self.memory_s + self.communication_s


@dataclass(frozen=True, kw_only=True)
class Account:
    """Of a step, on each device of a target."""

    target: Target
    step: Step
    held: Held
    on_host: int  # bytes of a device's part of the reference in its host's memory
    gradients: int  # bytes, of temporaries
    head: int  # bytes that the head takes of temporaries at most
    work: Work
    temporaries: int | None = None  # bytes; None: the compiler refused the step
    peak: int | None = None  # bytes; None: it does not say how much it would take
    refusal: str | None = None  # its words
    traffic: Traffic | None = None
    compiler_flops: float | None = None  # what is in a loop counted once
    compiler_bytes: float | None = None
    compile_s: float

    @property
    def fits(self) -> bool:
        """Whether a device has the memory for it.

        A TPU's compiler knows: it refuses what it cannot place, and places some
        temporaries where arguments were.
        """
        if self.refusal is not None or self.peak is None:
            return False
        placed = self.target.chip.platform == "tpu"
        return placed or self.peak <= self.target.capacity

    @property
    def pairs(self) -> int:
        """Of a step, over all devices."""
        return self.step.run.arguments.total_batch_size

    @property
    def tokens(self) -> int:
        """Positions of a step's rows over all devices, padding included."""
        return self.step.positions

    @property
    def activations(self) -> int | None:
        """Bytes of temporaries besides the gradients."""
        if self.temporaries is None:
            return None
        return max(self.temporaries - self.gradients, 0)

    @property
    def times(self) -> Times | None:
        """How long a step takes, where the device's rates and the traffic are known."""
        chip = self.target.chip
        if self.traffic is None or not chip.flops_per_s:
            return None
        wire = sum(x.wire for x in self.traffic.collectives)
        exposed = sum(x.exposed for x in self.traffic.collectives)
        return Times(
            products_s=self.work.total / chip.flops_per_s,
            memory_s=self.traffic.memory_bytes / chip.bytes_per_s,
            communication_s=wire / chip.link_bytes_per_s,
            exposed_s=exposed / chip.link_bytes_per_s,
        )


def take_account(step: Step, target: Target) -> Account:
    """Compile a step, and read what its compiler says of it."""
    began = time.perf_counter()
    account = Account(
        target=target,
        step=step,
        held=held_by(step),
        on_host=on_host_by(step),
        gradients=_gradients(step),
        head=_head(step),
        work=work_of(step),
        compile_s=0.0,
    )

    def finished(**found: Any) -> Account:
        seconds = time.perf_counter() - began
        return dataclasses.replace(account, compile_s=seconds, **found)

    try:
        with known_options():
            compiled = step.request.step.lower(*step.operands).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        words = " ".join(str(error).split())
        return finished(refusal=words[:300], peak=needed(words))
    cost = compiled.cost_analysis() or {}
    mesh = dict(step.run.mesh.shape)
    program = parse(compiled.as_text(), mesh[SEQUENCE])
    taken = taken_by(compiled, target.chip.platform)
    assert taken is not None
    return finished(
        temporaries=taken.temporary,
        peak=taken.peak,
        traffic=traffic_of(program, mesh),
        compiler_flops=cost.get("flops"),
        compiler_bytes=cost.get("bytes accessed"),
    )


def held_by(step: Step) -> Held:
    """What a device holds throughout; nothing is compiled for it."""
    state, frozen, reference, batch, _ = step.operands
    return Held(
        parameters=_bytes(state.params),
        frozen=_bytes(frozen),
        optimizer=_bytes(state.opt_state) + _bytes(state.step),
        reference=_bytes(reference),
        batch=_bytes(batch),
    )


def on_host_by(step: Step) -> int:
    """What the host holds throughout of a device's part of the reference."""
    return _bytes(step.operands[2], host=True)


def _bytes(tree: Any, *, host: bool = False) -> int:
    """Of one device's shards, on the device or in the host's memory."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if on_host(x) == host
    )


def _gradients(step: Step) -> int:
    state = step.operands[0]
    return sum(
        4 * math.prod(x.sharding.shard_shape(x.shape))
        for x in jax.tree.leaves(state.params)
    )


def _head(step: Step) -> int:
    """What `token_logprobs` promises to take at most: its workspace, and d hidden."""
    rows = step.run.mesh.shape[FSDP] * step.shape[1]
    return step.run.arguments.workspace_bytes + 4 * rows * step.model.hidden_size


def needed(words: str) -> int | None:
    """Bytes that a program would need, by a compiler's refusal; None: not said."""
    for pattern in _REFUSALS:
        if found := pattern.search(words):
            return int(float(found[1]) * _UNITS[found[2]])
    return None


def as_json(account: Account) -> dict[str, Any]:
    """Everything that is known, in bytes, FLOPs and seconds, of each device."""
    target, step, times = account.target, account.step, account.times
    traffic = account.traffic
    return {
        "target": target.text,
        "device": target.chip.name,
        "devices": target.count,
        "compiler": target.chip.compiler,
        "fits": account.fits,
        "refusal": account.refusal,
        "capacity_bytes": target.capacity,
        "peak_bytes": account.peak,
        "held_bytes": dataclasses.asdict(account.held),
        "reference_on_host_bytes": account.on_host,
        "gradient_bytes": account.gradients,
        "temporary_bytes": account.temporaries,
        "activation_bytes": account.activations,
        "head_bytes_at_most": account.head,
        "mesh": dict(step.run.mesh.shape),
        "pairs": account.pairs,
        "microbatches": step.run.plan.grid[0],
        "packing": step.run.arguments.packing,
        "share_prompt": step.run.arguments.share_prompt,
        "length": step.shape[0],
        "scored_capacity": step.shape[1],
        "remat": step.policy.remat,
        "flops": {
            f"{part}, {phase}": n for (part, phase), n in account.work.flops.items()
        },
        "flops_total": account.work.total,
        "flops_by_phase": {x: account.work.of_phase(x) for x in PHASES},
        "uncounted_kernels": sorted(account.work.uncounted),
        "compiler_flops_loops_once": account.compiler_flops,
        "compiler_bytes_loops_once": account.compiler_bytes,
        "memory_bytes_moved": traffic and traffic.memory_bytes,
        "unknown_loops": traffic and traffic.unknown_loops,
        "collectives": traffic
        and [x._asdict() | {"axes": list(x.axes)} for x in traffic.collectives],
        "peak_rates": {
            "flops_per_s": target.chip.flops_per_s,
            "memory_bytes_per_s": target.chip.bytes_per_s,
            "link_bytes_per_s": target.chip.link_bytes_per_s,
        },
        "seconds": times and dataclasses.asdict(times),
        "least_s": times and times.least_s,
        "most_s": times and times.most_s,
        "tokens_per_step": account.tokens,
        "compile_s": round(account.compile_s, 1),
    }
