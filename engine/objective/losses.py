"""The losses: `sigmoid`, `hinge`, `ipo`. Each is a pure function of log-probabilities.

Notation of the sources: c and r are policy minus reference for chosen and rejected, the
margin is c - r.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = Any  # a float, an array without axes, or what stands for one in JAX


class PairLogps(NamedTuple):
    """What a loss may see of pairs: nats, float32, summed over completions."""

    chosen: Float[Array, " B"]  # policy
    rejected: Float[Array, " B"]
    ref_chosen: Float[Array, " B"]  # reference; zeros when reference-free
    ref_rejected: Float[Array, " B"]
    chosen_length: Float[Array, " B"]  # scored tokens
    rejected_length: Float[Array, " B"]
    weights: Float[Array, " B"]  # 0 for a padding pair, which is to have no effect

    @property
    def margin(self) -> Float[Array, " B"]:
        """How much more than the reference the policy prefers the chosen: c - r."""
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Numbers that losses share: arguments of the compiled step, not part of it."""

    beta: Scalar
    label_smoothing: Scalar = 0.0


class LossOut(NamedTuple):
    """What a loss returns. The batch's loss is the weighted mean of `per_pair`."""

    per_pair: Float[Array, " B"]
    metrics: Mapping[str, Float[Array, " B"]] = {}  # the loss's own, by their names


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A row of the table: the function, and which options mean something to it.

    A `whole_batch` loss compares pairs with each other: it is given all pairs of the
    optimizer step at once, over every device and microbatch. Any other is given them in
    pieces, and a pair's loss must not depend on which others are there.
    """

    function: Callable[[PairLogps, LossOptions], LossOut]
    whole_batch: bool = False
    options: frozenset[str] = field(default=frozenset())  # of DPOConfig, besides beta


def sigmoid(logps: PairLogps, options: LossOptions) -> LossOut:
    """-(1 - eps) log sigmoid(beta margin) - eps log sigmoid(-beta margin).

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; with eps, the conservative
    form of Mitchell 2023 (a note on DPO with noisy preferences).
    """
    x, eps = options.beta * logps.margin, options.label_smoothing
    return LossOut(-(1 - eps) * jax.nn.log_sigmoid(x) - eps * jax.nn.log_sigmoid(-x))


def hinge(logps: PairLogps, options: LossOptions) -> LossOut:
    """max(0, 1 - beta margin).

    Source: Liu et al. 2023, arXiv:2309.06657 (RSO), the normalised SLiC loss.
    """
    return LossOut(jax.nn.relu(1 - options.beta * logps.margin))


def ipo(logps: PairLogps, options: LossOptions) -> LossOut:
    """(c / |chosen| - r / |rejected| - 1 / (2 beta)) squared, on means over tokens.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17; the means over tokens are the
    form that its authors use.
    """
    # An empty completion has log-probability 0, and its mean is 0 as well.
    chosen_length = jnp.maximum(logps.chosen_length, 1)
    rejected_length = jnp.maximum(logps.rejected_length, 1)
    chosen = (logps.chosen - logps.ref_chosen) / chosen_length
    rejected = (logps.rejected - logps.ref_rejected) / rejected_length
    return LossOut((chosen - rejected - 1 / (2 * options.beta)) ** 2)


LOSSES = {
    "sigmoid": Loss(function=sigmoid, options=frozenset({"label_smoothing"})),
    "hinge": Loss(function=hinge),
    "ipo": Loss(function=ipo),
}
