"""The tables of `dpo verify`: their cases, their rows, how large an error may be."""

from dataclasses import dataclass

import jax.numpy as jnp

from dpo_kernels.op.devices import traced_device
from dpo_kernels.op.interface import STATS
from dpo_kernels.op.tiling import Problem

# A kernel sums in another order than plain JAX and rounds dlogits to the compute dtype.
SLACK = 4.0
# What float32 sums of some thousand terms differ by, whatever the order.
FLOOR = 1e-5
Shape = tuple[int, int, int, int]  # T, D, V, workspace


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of options, named by what is on."""

    name: str
    softcap: float | None = None
    scale: float = 1.0
    bias: bool = False
    valid_share: float | None = None  # of the rows; None: num_valid is not given
    stats: tuple[str, ...] = ()
    offset: float = 0.0  # of all logits alike; they are then exact in every dtype


CASES = (
    Case(name="plain"),
    Case(name="stats", stats=STATS),
    Case(name="bias", bias=True, stats=STATS),
    Case(name="softcap", softcap=2.0, scale=0.7, stats=STATS),
    Case(name="padded", valid_share=0.6, stats=STATS),
    Case(name="empty", valid_share=0.0, stats=STATS),
    # A float32 near 4096 is a multiple of 5e-4, one near 2**26 a multiple of 8: what
    # goes through the absolute lse is wrong by as much.
    Case(name="offset", offset=2.0**12, stats=STATS),
    Case(name="huge", offset=2.0**26, stats=STATS),
    Case(name="all", softcap=3.0, scale=1.3, bias=True, valid_share=0.9, stats=STATS),
)


def problem(dtype: str, shape: Shape, case: Case) -> Problem:
    """What a row asks of a backend on this device."""
    T, D, V, workspace_bytes = shape
    return Problem(
        T=T,
        D=D,
        V=V,
        dtype=jnp.dtype(dtype),
        workspace_bytes=workspace_bytes,
        device=traced_device(),
        ragged=case.valid_share is not None,
    )


def bound(plain_error: float, dtype: str) -> float:
    """What an error may be where plain JAX's is `plain_error`."""
    return SLACK * plain_error + (1e-13 if dtype == "float64" else FLOOR)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: errors relative to float64, and what they may be."""

    implementation: str
    dtype: str
    shape: tuple[int, int, int]
    case: str
    forward: float
    forward_bound: float
    gradient: float
    gradient_bound: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within their bounds."""
        within = self.forward <= self.forward_bound
        return within and self.gradient <= self.gradient_bound

    def __str__(self) -> str:
        """One line, aligned with `HEADER`."""
        T, D, V = self.shape
        return (
            f"{self.implementation:<16}{self.dtype:<10}{f'{T}x{D}x{V}':<15}"
            f"{self.case:<9}{self.forward:>10.2e}{self.forward_bound:>10.2e}"
            f"{self.gradient:>11.2e}{self.gradient_bound:>10.2e}  "
            f"{'pass' if self.passed else 'FAIL'}"
        )


HEADER = (
    f"{'implementation':<16}{'dtype':<10}{'TxDxV':<15}{'options':<9}{'forward':>10}"
    f"{'bound':>10}{'gradient':>11}{'bound':>10}  "
)
