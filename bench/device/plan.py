"""What is measured, and how long. Imports neither JAX nor torch.

Letters: T scored tokens, D hidden, V vocabulary.
"""

from dataclasses import dataclass

MIB = 2**20
WORKSPACE = 256 * MIB  # the op's default

MATMUL = "matmul"  # XLA's bare product hidden @ head.T: what R is
FORWARD = "token_logprobs, forward"
GRADIENT = "token_logprobs, forward and gradient"
DPO = "DPO loss of the head, forward and gradient"
STEP = "DPO step"
VERIFY = "verify"
SANITIZER = "compute-sanitizer"

# Floating-point operations of one call, over TDV.
FLOPS = {MATMUL: 2, FORWARD: 2, GRADIENT: 8, DPO: 10}
KEEPS = 6  # of forward and gradient, where the logits or their exponentials are kept


def mib(workspace: int) -> str:
    """The name of a setting."""
    return f"{workspace // MIB} MiB"


Shape = tuple[int, int, int]  # T, D, V


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes of a run."""

    shapes: tuple[Shape, ...]  # the first is the main one
    with_truth: tuple[Shape, ...] = ()  # where gradients are compared with float64
    small: tuple[Shape, ...] = ()  # few rows
    sweep: tuple[Shape, ...] = ()  # for the plots, the most telling first
    # Workspaces that let the op keep exponentials.
    keeping: tuple[int, ...] = (1024 * MIB, 2048 * MIB)
    sequences: int = 16  # of the DPO loss: 8 chosen, then 8 rejected
    runs: int = 20  # of one program on the same inputs, for the same bits
    rounds: int = 7
    slice_s: float = 0.08  # of one candidate in one round
    settle_s: float = 0.8  # of work before the first round: the clocks drop by then
    hang_s: float = 100.0  # without a word from a process, before it is ended

    @property
    def main(self) -> Shape:
        """The shape that has every candidate."""
        return self.shapes[0]
