"""Every DPO loss: a pure function of summed log-probabilities, one value a pair.

Notation of the sources: c and r are policy minus reference for chosen and rejected.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class PairLogps(NamedTuple):
    """What a loss may see of a batch: nats, float32, summed over completions."""

    chosen: Float[Array, " B"]  # policy
    rejected: Float[Array, " B"]
    ref_chosen: Float[Array, " B"]  # reference; zeros when reference-free
    ref_rejected: Float[Array, " B"]
    chosen_length: Float[Array, " B"]  # scored tokens
    rejected_length: Float[Array, " B"]

    @property
    def delta(self) -> Float[Array, " B"]:
        """c - r: how much more than the reference the policy prefers the chosen."""
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Scalars that losses share."""

    beta: float
    label_smoothing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A row of the table: the function, and which options mean something to it."""

    pairwise: Callable[[PairLogps, LossOptions], Float[Array, " B"]]
    label_smoothing: bool = False


def sigmoid(logps: PairLogps, options: LossOptions) -> Float[Array, " B"]:
    """-(1 - eps) log sigmoid(beta delta) - eps log sigmoid(-beta delta).

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; with eps, the conservative
    form of Mitchell 2023 (a note on DPO with noisy preferences).
    """
    x, eps = options.beta * logps.delta, options.label_smoothing
    return -(1 - eps) * jax.nn.log_sigmoid(x) - eps * jax.nn.log_sigmoid(-x)


def hinge(logps: PairLogps, options: LossOptions) -> Float[Array, " B"]:
    """max(0, 1 - beta delta).

    Source: Liu et al. 2023, arXiv:2309.06657 (RSO), the normalised SLiC loss.
    """
    return jax.nn.relu(1 - options.beta * logps.delta)


def ipo(logps: PairLogps, options: LossOptions) -> Float[Array, " B"]:
    """(c / |chosen| - r / |rejected| - 1 / (2 beta)) squared, on means over tokens.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17; the means over tokens are the
    form that its authors use.
    """
    # An empty completion has log-probability 0, and its mean is 0 as well.
    chosen_length = jnp.maximum(logps.chosen_length, 1)
    rejected_length = jnp.maximum(logps.rejected_length, 1)
    chosen = (logps.chosen - logps.ref_chosen) / chosen_length
    rejected = (logps.rejected - logps.ref_rejected) / rejected_length
    return (chosen - rejected - 1 / (2 * options.beta)) ** 2


LOSSES = {
    "sigmoid": Loss(pairwise=sigmoid, label_smoothing=True),
    "hinge": Loss(pairwise=hinge),
    "ipo": Loss(pairwise=ipo),
}
