"""What a LoRA adapter is: which linear modules have one, and of which rank."""

import math
from dataclasses import dataclass, field

# PEFT's (and the checkpoints') names of a layer's linear modules, and ours.
LINEARS = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
PEFT_TARGETS = ("q_proj", "v_proj")  # PEFT's choice for every family here


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """x W^T becomes x W^T + scale * (x A^T) B^T in `modules` of every layer.

    Source: Hu et al. 2021, arXiv:2106.09685; the form is PEFT's.
    """

    rank: int
    alpha: float
    modules: tuple[str, ...]  # keys of LINEARS, in its order
    rslora: bool = False  # Kalajdzievski 2023, arXiv:2312.03732
    dropout: float = 0.0  # of x on its way into A, while training
    # The base's name, for whoever loads the adapter again.
    base: str | None = field(default=None, compare=False)
    dtype: str | None = field(default=None, compare=False)  # of its file, if it has one

    @property
    def scale(self) -> float:
        """alpha / rank; of rank-stabilised LoRA alpha / sqrt(rank)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
