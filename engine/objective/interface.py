"""What a loss is given and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
from jaxtyping import Array, Float

from engine.objective.divergences import score

Scalar = Any  # a float, an array without axes, or what stands for one in JAX

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


class PairLogps(NamedTuple):
    """What a loss may see of pairs: nats, float32, summed over completions.

    With `ld_alpha` the sums give tokens past the length of the shorter completion that
    weight; `whole_chosen` never does.
    """

    chosen: Float[Array, " B"]  # policy
    rejected: Float[Array, " B"]
    ref_chosen: Float[Array, " B"]  # reference; zeros where there is none
    ref_rejected: Float[Array, " B"]
    chosen_length: Float[Array, " B"]  # scored tokens
    rejected_length: Float[Array, " B"]
    # Of the pair in every mean over pairs. 0: a padding pair, which has no effect.
    weights: Float[Array, " B"]
    whole_chosen: Float[Array, " B"]  # policy, every scored token weighing 1
    # chosen_length in the mean over all pairs of the optimizer step: one number.
    mean_chosen_length: Float[Array, " B"]
    likelihood: Float[Array, " B"]  # WPO's weight of the pair; 1 where it is not used

    @property
    def chosen_ratio(self) -> Float[Array, " B"]:
        """log(policy / reference) of the chosen: c in the formulas."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Float[Array, " B"]:
        """log(policy / reference) of the rejected: r in the formulas."""
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Float[Array, " B"]:
        """How much more than the reference the policy prefers the chosen: c - r."""
        return self.chosen_ratio - self.rejected_ratio

    def pair_mean(self, values: Float[Array, " B"]) -> Float[Array, ""]:
        """The mean over these pairs, by their weights."""
        return (self.weights * values).sum() / self.weights.sum()


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Numbers that losses share: arguments of the compiled step, not part of it.

    The divergence's kind alone is compiled into the step.
    """

    beta: Scalar
    label_smoothing: Scalar = 0.0
    discopop_tau: Scalar = 0.05
    dpop_lambda: Scalar = 50.0
    simpo_gamma: Scalar = 0.5
    cpo_alpha: Scalar = 1.0
    loss_weights: tuple[Scalar, ...] = (1.0,)  # of the losses that are added up
    f_alpha_divergence_coef: Scalar = 0.5
    f_divergence_type: Divergence = field(
        default="reverse_kl", metadata={"static": True}
    )

    def scores(self, logps: PairLogps) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """The divergence's score of chosen and rejected: c and r for reverse KL."""
        kind, alpha = self.f_divergence_type, self.f_alpha_divergence_coef
        return (
            score(logps.chosen_ratio, kind, alpha),
            score(logps.rejected_ratio, kind, alpha),
        )

    def score_margin(self, logps: PairLogps) -> Float[Array, " B"]:
        """The difference of the two scores; the margin for reverse KL."""
        chosen, rejected = self.scores(logps)
        return chosen - rejected


class LossOut(NamedTuple):
    """What a loss returns. The batch's loss is the weighted mean of `per_pair`."""

    per_pair: Float[Array, " B"]
    metrics: Mapping[str, Float[Array, " B"]] = {}  # the loss's own, by their names
    # Of chosen and rejected, where they are not beta times c and r.
    rewards: tuple[Float[Array, " B"], Float[Array, " B"]] | None = None
