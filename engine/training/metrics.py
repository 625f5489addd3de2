"""The table of metrics: what is summed inside the step, and the means made of it.

Names and definitions are TRL's, but for log_ratio, which it lacks; rewards are in nats
times beta, logps, log_ratio and entropy in nats. A new metric is a row of `METRICS`, or
of the `metrics` that a loss returns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dpo_kernels import TokenLogprobs
from engine.objective.interface import LossOptions, LossOut, PairLogps
from engine.objective.losses import Loss
from engine.objective.scoring import (
    GroupTokens,
    ScoringOptions,
    pair_sums,
    token_weights,
)

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
    """A mean over pairs, or over scored tokens: all, or of one side.

    `value` has one entry for each of what it is `summed` over: by default what the mean
    is over.
    """

    over: Over
    value: Callable[[Observed], Array | None]
    summed: Over | None = None


def _rewards(observed: Observed) -> tuple[Array, Array]:
    """Of chosen and rejected: beta times the log-ratio, or the loss's own."""
    if observed.loss.rewards is not None:
        return observed.loss.rewards
    beta, logps = observed.options.beta, observed.logps
    return beta * logps.chosen_ratio, beta * logps.rejected_ratio


def _reward_margin(observed: Observed) -> Array:
    if observed.loss.rewards is None:
        return observed.options.beta * observed.logps.margin
    chosen, rejected = observed.loss.rewards
    return chosen - rejected


METRICS = {
    "loss": Metric(over="pairs", value=lambda x: x.loss.per_pair),
    "rewards/chosen": Metric(over="pairs", value=lambda x: _rewards(x)[0]),
    "rewards/rejected": Metric(over="pairs", value=lambda x: _rewards(x)[1]),
    "rewards/margins": Metric(over="pairs", value=_reward_margin),
    "rewards/accuracies": Metric(over="pairs", value=lambda x: _reward_margin(x) > 0),
    "logps/chosen": Metric(over="pairs", value=lambda x: x.logps.chosen),
    "logps/rejected": Metric(over="pairs", value=lambda x: x.logps.rejected),
    # How far the policy has moved from the reference, a token.
    "log_ratio/chosen": Metric(
        over="chosen", summed="pairs", value=lambda x: x.logps.chosen_ratio
    ),
    "log_ratio/rejected": Metric(
        over="rejected", summed="pairs", value=lambda x: x.logps.rejected_ratio
    ),
    "logits/chosen": Metric(over="chosen", value=lambda x: x.tokens.mean_logit),
    "logits/rejected": Metric(over="rejected", value=lambda x: x.tokens.mean_logit),
    "entropy": Metric(over="tokens", value=lambda x: x.tokens.entropy),
    "mean_token_accuracy": Metric(over="chosen", value=lambda x: x.tokens.top1),
}


class Sums(NamedTuple):
    """Weighted sums over pairs or tokens, and the sums of the weights; float32."""

    sums: dict[str, dict[str, Float[Array, ""]]]  # by what they are over, then by name
    weights: dict[str, Float[Array, ""]]  # by what they are over


class PairValues(NamedTuple):
    """Of each pair what it adds to `Sums`; float32, its weight multiplied in."""

    sums: dict[str, dict[str, Float[Array, " B"]]]
    weights: dict[str, Float[Array, " B"]]


def pair_values(
    observed: Observed, group: GroupTokens, scoring: ScoringOptions
) -> PairValues:
    """What the pairs of an fsdp group add to the sums, one by one."""
    pair_B, logps = group.pair_weights, observed.logps
    lengths = logps.chosen_length, logps.rejected_length
    weights = {
        "pairs": pair_B,
        "tokens": pair_B * (lengths[0] + lengths[1]),
        "chosen": pair_B * lengths[0],
        "rejected": pair_B * lengths[1],
    }
    sums: dict[str, dict[str, Array]] = {over: {} for over in weights}
    for name, metric in _table(observed).items():
        values = metric.value(observed)
        assert values is not None, f"{name} needs a statistic that is not in STATS"
        values = values.astype(jnp.float32)
        if (metric.summed or metric.over) != "pairs":
            chosen, rejected = pair_sums(values, group, scoring)
            sides = {
                "chosen": chosen,
                "rejected": rejected,
                "tokens": chosen + rejected,
            }
            values = sides[metric.over]
        # 0 * NaN is no zero: what pads the pairs may hold anything.
        sums[metric.over][name] = jnp.where(pair_B > 0, pair_B * values, 0.0)
    return PairValues(sums=sums, weights=weights)


def _table(observed: Observed) -> dict[str, Metric]:
    """The metrics of this loss."""
    return METRICS | {
        name: Metric(over="pairs", value=lambda _, values=values: values)
        for name, values in observed.loss.metrics.items()
    }


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
    sums: dict[str, dict[str, Array]] = {over: {} for over in weights}
    for name, metric in _table(observed).items():
        values = metric.value(observed)
        assert values is not None, f"{name} needs a statistic that is not in STATS"
        each = weights[metric.summed or metric.over]
        sums[metric.over][name] = (each * values.astype(jnp.float32)).sum()
    return Sums(sums=sums, weights={over: x.sum() for over, x in weights.items()})


def metric_names(loss: Loss, options: LossOptions) -> tuple[str, ...]:
    """The names of every metric under a loss, its own too."""

    def own(x: Float[Array, " B"]) -> LossOut:
        return loss.function(PairLogps(*[x] * len(PairLogps._fields)), options)

    out = jax.eval_shape(own, jax.ShapeDtypeStruct((2,), jnp.float32))
    return (*METRICS, *out.metrics)


def means(sums: Sums) -> dict[str, float]:
    """The metrics, of sums that are on the host. A mean over no tokens is 0."""
    return {
        name: float(value) / float(sums.weights[over]) if sums.weights[over] else 0.0
        for over, values in sums.sums.items()
        for name, value in values.items()
    }
