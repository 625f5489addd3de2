"""What is measured: shapes, settings, goals, and how much time each section may take.

Letters: T scored tokens, D hidden, V vocabulary. Imports neither JAX nor torch.
"""

from dataclasses import dataclass

MIB = 2**20
WORKSPACE = 256 * MIB  # the op's default
KEEPING = (1024 * MIB, 2048 * MIB)  # workspaces that let it keep exponentials

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
class Goal:
    """A bound on one number of a row."""

    text: str
    least: float | None = None
    most: float | None = None

    def met(self, value: float) -> bool:
        """Whether the number is within the bound."""
        low = self.least is None or value >= self.least
        return low and (self.most is None or value <= self.most)


FORWARD_GOALS = {
    "mosaic_gpu": Goal(text="forward >= 0.92 R", least=92),
    "triton": Goal(text="forward >= 0.80 R", least=80),
}
GRADIENT_GOAL = Goal(text="forward and gradient at 8TDV >= 0.88 R", least=88)
SMALL_GOAL = Goal(text="forward and gradient of few rows >= 0.75 R", least=75)
KEEPING_GOAL = Goal(text="forward and gradient, 1 GiB <= 17.3 ms", most=17.3)
PADDED_GOAL = Goal(text="half the rows padded <= 0.55 of the time", most=0.55)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes of a run."""

    shapes: tuple[Shape, ...]  # the first is the main one
    with_truth: tuple[Shape, ...]  # where gradients are compared with float64
    small: tuple[Shape, ...]
    sweep: tuple[Shape, ...]  # for the plots, the most telling first
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


def _sweep(T: int, D: int, V: int, Ts: list[int], Vs: list[int]) -> tuple[Shape, ...]:
    return tuple([(T, D, v) for v in Vs] + [(t, D, V) for t in Ts])


REAL = Plan(
    shapes=(
        (4096, 4096, 128256),
        (8192, 2304, 256000),
        (4096, 4096, 151936),
        (16384, 8192, 128256),
    ),
    with_truth=((4096, 4096, 128256), (8192, 2304, 256000)),
    small=((1024, 4096, 128256), (2048, 4096, 128256)),
    sweep=_sweep(4096, 4096, 128256, [16384, 1024], [524288, 32768])
    + _sweep(4096, 4096, 128256, [8192, 2048], [262144, 65536]),
)
REHEARSAL = Plan(
    shapes=((64, 32, 301), (48, 16, 515)),
    with_truth=((64, 32, 301),),
    small=((16, 32, 301),),
    sweep=_sweep(64, 32, 301, [32], [128, 603]),
    runs=3,
    rounds=2,
    slice_s=0.002,
    settle_s=0.0,
    hang_s=300.0,
)

# Seconds, in the order of running; what one leaves over is the next ones'.
BUDGETS = {
    "correctness": 90,
    "truth": 30,
    "speed": 100,
    "peers": 55,
    "step": 75,
    "sanitizer": 30,
    "sweep": 40,
    "sweep_peers": 35,
}
LIMIT_S = 470  # of the whole
