"""What torch offers for the same op. Imports torch and the peers when they are made.

Every peer gets bfloat16 operands and, where its interface takes them, a gradient of
either sign for each token, as DPO has them.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.device import plan

CCE, LIGER = "cut_cross_entropy", "liger_kernel"
BETA = 0.1
CHUNK_T = 1024
Loss = Callable[..., Any]  # of a TorchInputs, a scalar to be differentiated


@dataclass(kw_only=True)
class TorchInputs:
    """As `programs.Inputs`, on torch's device; targets are int64."""

    hidden: Any
    head: Any
    targets: Any
    dlogprob: Any
    ref_hidden: Any = None
    ref_head: Any = None
    sequences: int = 16

    def bytes(self, op: str) -> int:
        """Of what a candidate for `op` is given."""
        arrays = [self.hidden, self.head, self.targets, self.dlogprob]
        if op == plan.DPO:
            arrays += [self.ref_hidden, self.ref_head]
        return sum(x.numel() * x.element_size() for x in arrays)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One implementation of somebody else's."""

    name: str
    make: Callable[[], Loss]  # imports it
    package: str = "torch"  # that has to be there
    op: str = plan.GRADIENT
    flops: int = plan.KEEPS
    note: str = ""
    sweep: bool = False  # has a line in the plots
    comparable: bool = True  # its gradients are those of the truth


def missing(peer: Peer) -> str | None:
    """The package that is not installed."""
    for package in ("torch", peer.package):
        if importlib.util.find_spec(package) is None:
            return f"{package.replace('_', '-')} is not installed"
    return None


def weighted(nll_of: Loss) -> Loss:
    """The sum of dlogprob * logprob."""
    return lambda x: -(nll_of(x) * x.dlogprob).sum()


def eager_nll(hidden: Any, head: Any, targets: Any) -> Any:
    """Full logits in bfloat16, their softmax in float32."""
    functional = importlib.import_module("torch.nn.functional")
    return functional.cross_entropy(
        (hidden @ head.T).float(), targets, reduction="none"
    )


def make_eager() -> Loss:
    """torch as it is."""
    return weighted(lambda x: eager_nll(x.hidden, x.head, x.targets))


def make_compiled() -> Loss:
    """The same under torch.compile."""
    torch = importlib.import_module("torch")
    nll = torch.compile(eager_nll, dynamic=False)
    return weighted(lambda x: nll(x.hidden, x.head, x.targets))


def make_compiled_chunks() -> Loss:
    """A chunk of tokens at a time, computed again in the backward."""
    torch = importlib.import_module("torch")
    checkpoint = importlib.import_module("torch.utils.checkpoint").checkpoint
    nll = torch.compile(eager_nll, dynamic=False)

    def chunks(x: TorchInputs) -> Any:
        parts = zip(x.hidden.split(CHUNK_T), x.targets.split(CHUNK_T), strict=True)
        found = [
            checkpoint(nll, hidden, x.head, targets, use_reentrant=False)
            for hidden, targets in parts
        ]
        return torch.cat(found)

    return weighted(chunks)


def make_cce() -> Loss:
    """Skips the gradients of what has next to no probability."""
    package = importlib.import_module(CCE)

    def nll(x: TorchInputs) -> Any:
        return package.linear_cross_entropy(
            x.hidden, x.head, x.targets, reduction="none"
        )

    return weighted(nll)


def make_cce_exact() -> Loss:
    """Skips nothing; later releases also sum in float32 then."""
    package = importlib.import_module(CCE)
    has_exact = "CCE_EXACT" in package.LinearCrossEntropyImpl.__members__
    options = {"impl": "cce_exact"} if has_exact else {"filter_eps": None}

    def nll(x: TorchInputs) -> Any:
        return package.linear_cross_entropy(
            x.hidden, x.head, x.targets, reduction="none", **options
        )

    return weighted(nll)


def make_liger(*, float32: bool = False, reduction: str = "none") -> Loss:
    """In chunks of tokens; with "none" the forward is computed again backwards."""
    torch = importlib.import_module("torch")
    functional = importlib.import_module("liger_kernel.transformers.functional")

    def nll(x: TorchInputs) -> Any:
        return functional.liger_fused_linear_cross_entropy(
            x.hidden,
            x.head,
            x.targets,
            reduction=reduction,
            accum_dtype=torch.float32 if float32 else None,
        )

    return weighted(nll) if reduction == "none" else nll


def make_liger_dpo(chunk_size: int) -> Loss:
    """`chunk_size` pairs at a time, chosen and rejected, policy and reference."""
    package = importlib.import_module("liger_kernel.chunked_loss")
    loss = package.LigerFusedLinearDPOLoss(beta=BETA, chunk_size=chunk_size)

    def call(x: TorchInputs) -> Any:
        def sequences(tokens: Any) -> Any:
            return tokens.reshape(x.sequences, -1, tokens.shape[-1])

        value, _ = loss(
            x.head,
            sequences(x.hidden),
            x.targets.reshape(x.sequences, -1),
            ref_input=sequences(x.ref_hidden),
            ref_weight=x.ref_head,
        )
        return value

    return call


PEERS = (
    Peer(name="cut-cross-entropy", package=CCE, make=make_cce, flops=8, sweep=True),
    Peer(
        name="cut-cross-entropy, exact",
        package=CCE,
        make=make_cce_exact,
        flops=8,
        sweep=True,
    ),
    Peer(name="torch.compile", make=make_compiled, sweep=True),
    Peer(name="Liger FLCE", package=LIGER, make=make_liger, flops=8, sweep=True),
    Peer(
        name="Liger FLCE, float32 sums",
        package=LIGER,
        make=lambda: make_liger(float32=True),
        flops=8,
    ),
    Peer(
        name="Liger FLCE, mean",
        package=LIGER,
        make=lambda: make_liger(reduction="mean"),
        note="the same gradient for every token, known in the forward: not DPO's",
        comparable=False,
    ),
    Peer(
        name="Liger DPO loss",
        package=LIGER,
        make=lambda: make_liger_dpo(1),
        op=plan.DPO,
        flops=8,
    ),
    Peer(
        name="Liger DPO loss, 8 pairs at once",
        package=LIGER,
        make=lambda: make_liger_dpo(8),
        op=plan.DPO,
        flops=8,
    ),
    Peer(name="torch.compile, token chunks", make=make_compiled_chunks, flops=8),
    Peer(name="torch", make=make_eager),
)
