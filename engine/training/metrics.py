"""The table of metrics: what is summed inside the step, and the means made of it.

Names and definitions are TRL's; rewards are in nats times beta, logps and entropy in
nats. A new metric is a row of `METRICS`, or of the `metrics` that a loss returns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dpo_kernels import TokenLogprobs
from engine.objective.losses import LossOptions, LossOut, PairLogps
from engine.objective.scoring import GroupTokens, token_weights

STATS = ("entropy", "mean_logit", "top1")  # of the op, that the table needs

Over = Literal["pairs", "tokens", "chosen", "rejected"]


class Observed(NamedTuple):
    """What a metric may be made of: the pairs and tokens of an fsdp group."""

    logps: PairLogps
    loss: LossOut
    tokens: TokenLogprobs
    options: LossOptions


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A mean over real pairs, or over scored tokens: all, or of one side."""

    over: Over
    value: Callable[[Observed], Array | None]  # one a pair, or one a token


def _reward(observed: Observed, logps: Array, ref_logps: Array) -> Array:
    return observed.options.beta * (logps - ref_logps)


METRICS = {
    "loss": Metric(over="pairs", value=lambda x: x.loss.per_pair),
    "rewards/chosen": Metric(
        over="pairs",
        value=lambda x: _reward(x, x.logps.chosen, x.logps.ref_chosen),
    ),
    "rewards/rejected": Metric(
        over="pairs",
        value=lambda x: _reward(x, x.logps.rejected, x.logps.ref_rejected),
    ),
    "rewards/margins": Metric(
        over="pairs", value=lambda x: x.options.beta * x.logps.margin
    ),
    "rewards/accuracies": Metric(over="pairs", value=lambda x: x.logps.margin > 0),
    "logps/chosen": Metric(over="pairs", value=lambda x: x.logps.chosen),
    "logps/rejected": Metric(over="pairs", value=lambda x: x.logps.rejected),
    "logits/chosen": Metric(over="chosen", value=lambda x: x.tokens.mean_logit),
    "logits/rejected": Metric(over="rejected", value=lambda x: x.tokens.mean_logit),
    "entropy": Metric(over="tokens", value=lambda x: x.tokens.entropy),
    "mean_token_accuracy": Metric(over="chosen", value=lambda x: x.tokens.top1),
}


class Sums(NamedTuple):
    """Weighted sums over pairs or tokens, and the sums of the weights; float32."""

    sums: dict[str, dict[str, Float[Array, ""]]]  # by what they are over, then by name
    weights: dict[str, Float[Array, ""]]  # by what they are over


def metric_sums(observed: Observed, group: GroupTokens) -> Sums:
    """What an fsdp group adds to the sums."""
    observed = jax.tree.map(lax.stop_gradient, observed)
    chosen_T, rejected_T = token_weights(group)
    weights = {
        "pairs": group.pair_weights,
        "tokens": chosen_T + rejected_T,
        "chosen": chosen_T,
        "rejected": rejected_T,
    }
    table = METRICS | {
        name: Metric(over="pairs", value=lambda _, values=values: values)
        for name, values in observed.loss.metrics.items()
    }
    sums: dict[str, dict[str, Array]] = {over: {} for over in weights}
    for name, metric in table.items():
        values = metric.value(observed)
        assert values is not None, f"{name} needs a statistic that is not in STATS"
        sums[metric.over][name] = (
            weights[metric.over] * values.astype(jnp.float32)
        ).sum()
    return Sums(sums=sums, weights={over: x.sum() for over, x in weights.items()})


def means(sums: Sums) -> dict[str, float]:
    """The metrics, of sums that are on the host. A mean over no tokens is 0."""
    return {
        name: float(value) / float(sums.weights[over]) if sums.weights[over] else 0.0
        for over, values in sums.sums.items()
        for name, value in values.items()
    }
