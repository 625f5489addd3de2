"""Fused log-probabilities of target tokens for preference tuning in JAX."""

from dpo_kernels.op.interface import TokenLogprobs
from dpo_kernels.sequence_sums import sequence_sums
from dpo_kernels.spread import spread_token_logprobs
from dpo_kernels.token_logprobs import token_logprobs

__all__ = [
    "TokenLogprobs",
    "sequence_sums",
    "spread_token_logprobs",
    "token_logprobs",
]
