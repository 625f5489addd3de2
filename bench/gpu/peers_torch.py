"""The torch peers' times, peak memory and gradient errors, in turns.

Inputs are those of `truth.py`, so the same as in JAX. Peak memory counts the inputs,
the gradients, and what is alive between.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from bench.device import plan
from bench.device.subject import Subject, why
from bench.device.timing import take_turns
from bench.gpu import shared
from bench.gpu.clocks import clocks
from bench.gpu.torch_peers import PEERS, Peer, TorchInputs, missing
from bench.gpu.worker import Context

MATMUL_NAME = "torch.matmul"


def failures() -> tuple[type[BaseException], ...]:
    """What a peer raises that cannot do this here, kernels that do not compile too."""
    found: list[type[BaseException]] = [
        RuntimeError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
    ]
    found += [AssertionError, ImportError]
    if importlib.util.find_spec("triton") is not None:
        found.append(importlib.import_module("triton.errors").TritonError)
    return tuple(found)


def subject_of(peer: Peer, shape: plan.Shape) -> Subject:
    """Of a peer's row."""
    T, D, V = shape
    return Subject(op=peer.op, implementation=peer.name, T=T, D=D, V=V)


class Card:
    """torch's device: the GPU, or the CPU in a rehearsal."""

    def __init__(self, rehearse: bool):
        self.torch = torch = importlib.import_module("torch")
        self.cuda = not rehearse
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.name = torch.cuda.get_device_name() if self.cuda else "cpu"

    def wait(self, _: Any = None) -> None:
        """Until all work is done."""
        if self.cuda:
            self.torch.cuda.synchronize()

    def peak(self, call: Callable[[], Any]) -> int | None:
        """Bytes that a call takes at its peak, above what was there before."""
        if not self.cuda:
            call()
            return None
        self.torch.cuda.empty_cache()
        self.wait()
        before = self.torch.cuda.memory_allocated()
        self.torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return self.torch.cuda.max_memory_allocated() - before

    def load(self, bits: Any, dtype: Any = None) -> Any:
        """An array of `shared`'s."""
        tensor = self.torch.from_numpy(bits)
        tensor = tensor if dtype is None else tensor.view(dtype)
        return tensor.to(self.device)


def inputs_of(context: Context, card: Card, shape: plan.Shape) -> TorchInputs:
    """Those of `truth.py`, or drawn alike where it has none."""
    (T, D, V), torch, dtype = shape, card.torch, card.torch.bfloat16
    generator = torch.Generator(card.device).manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, device=card.device)

    def array(name: str, otherwise: Callable[[], Any], dtype: Any = None) -> Any:
        bits = shared.load(context.work, shape, name)
        return otherwise() if bits is None else card.load(bits, dtype)

    def ids() -> Any:
        return torch.randint(0, V, (T,), generator=generator, device=card.device)

    has_reference = shape == context.plan.main
    return TorchInputs(
        hidden=array("hidden", lambda: normal(T, D).to(dtype), dtype).requires_grad_(),
        head=array(
            "head", lambda: (normal(V, D) * D**-0.5).to(dtype), dtype
        ).requires_grad_(),
        targets=array("targets", ids).long(),
        dlogprob=array("dlogprob", lambda: normal(T)),
        ref_hidden=array("ref_hidden", lambda: normal(T, D).to(dtype), dtype)
        if has_reference
        else None,
        ref_head=array("ref_head", lambda: (normal(V, D) * D**-0.5).to(dtype), dtype)
        if has_reference
        else None,
        sequences=context.plan.sequences,
    )


def step_of(loss: Callable[[TorchInputs], Any], x: TorchInputs) -> Callable[[], Any]:
    """Forward and backward; the gradients are left in the inputs."""

    def call() -> Any:
        x.hidden.grad = x.head.grad = None
        value = loss(x)
        value.backward()
        return value

    return call


def gradient_error(
    context: Context, card: Card, peer: Peer, shape: plan.Shape, x: TorchInputs
) -> dict[str, float]:
    """The larger of |gradient - truth| / |truth| of both, by the 2-norm."""
    prefix = "dpo_" if peer.op == plan.DPO else ""
    found = []
    for name, tensor in (("dhidden", x.hidden), ("dhead", x.head)):
        bits = shared.load(context.work, shape, prefix + name)
        if bits is None or not peer.comparable:
            return {}
        truth = card.load(bits)
        error = (tensor.grad.float() - truth).norm() / truth.norm()
        found.append(float(error))
    return {"gradient_error": float(f"{max(found):.3g}")}


def prepare(
    context: Context, card: Card, peer: Peer, shape: plan.Shape, x: TorchInputs
) -> tuple[Callable[[], Any], dict[str, Any]] | None:
    """A peer that runs, and what is known of it but its time; else a row says why."""
    subject = subject_of(peer, shape)
    absent = missing(peer)
    if absent is not None:
        context.row(subject, missing=absent, device=card.name)
        return None
    context.trying(subject)
    try:
        call = step_of(peer.make(), x)
        call()  # compiles
        x.hidden.grad = x.head.grad = None
        peak = card.peak(call)
    except failures() as error:
        if "CUDA error" in str(error):
            raise  # which spoils the process for the others, too
        context.row(subject, error=why(error), device=card.name)
        return None
    fields: dict[str, Any] = {"peak_bytes": None, "temp_bytes": None}
    if peak is not None:
        gradients = sum(t.numel() * t.element_size() for t in (x.hidden, x.head))
        fields["peak_bytes"] = peak + x.bytes(peer.op)
        fields["temp_bytes"] = peak - gradients
    fields |= gradient_error(context, card, peer, shape, x)
    x.hidden.grad = x.head.grad = None
    return call, fields


def measure(context: Context, peers: Sequence[Peer], shape: plan.Shape) -> None:
    """The rows of one shape."""
    T, D, V = shape
    card = Card(context.rehearse)
    card.torch.compiler.reset()
    x = inputs_of(context, card, shape)
    ready = {
        subject_of(peer, shape): (peer, prepared)
        for peer in peers
        if context.wanted(subject_of(peer, shape))
        for prepared in [prepare(context, card, peer, shape, x)]
        if prepared is not None
    }
    bare = Peer(name=MATMUL_NAME, make=lambda: lambda x: None, op=plan.MATMUL, flops=2)

    def matmul() -> Any:
        with card.torch.no_grad():
            return x.hidden @ x.head.T

    ready[subject_of(bare, shape)] = (bare, (matmul, {}))
    calls = {subject: prepared[0] for subject, (_, prepared) in ready.items()}
    times = take_turns(calls, card.wait, context.plan, context.trying)
    busy = clocks(matmul, card.wait)
    peak = 2 * T * D * V / times[subject_of(bare, shape)].median / 1e12
    for subject, (peer, (_, fields)) in ready.items():
        found = times[subject]
        note = {"note": peer.note} if peer.note else {}
        context.row(
            subject,
            seconds=found.median,
            flops=peer.flops * T * D * V,
            formula=f"{peer.flops}TDV",
            peak_tflops=peak,
            device=card.name,
            torch=card.torch.__version__,
            **found.fields(),
            **busy,
            **fields,
            **note,
        )


def no_torch(context: Context, peers: Sequence[Peer], shape: plan.Shape) -> bool:
    """Whether torch is not there; every peer's row then says so."""
    absent = missing(Peer(name="torch", make=lambda: lambda x: None))
    if absent is None:
        return False
    for peer in peers:
        context.row(subject_of(peer, shape), missing=absent)
    return True


def run(context: Context) -> None:
    """A task for each shape that has a truth."""
    shapes = {f"peers {shape}": shape for shape in context.plan.with_truth}
    for name in context.tasks(shapes):
        shape = shapes[name]
        # The DPO loss's reference is there for the main shape only.
        peers = [p for p in PEERS if p.op != plan.DPO or shape == context.plan.main]
        if not no_torch(context, peers, shape):
            measure(context, peers, shape)
