"""The table of losses, and their weighted sum.

A new loss is a function in `pair_losses` or `batch_losses` and a row here;
docs/losses.md has the formulas.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp

from engine.objective import batch_losses, pair_losses
from engine.objective.interface import LossOptions, LossOut, PairLogps


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A row of the table: the function, and what has a meaning beside it.

    A `whole_batch` loss compares pairs with each other: it is given all pairs of the
    optimizer step at once, over every device and microbatch. Any other is given them in
    pieces, and a pair's loss must not depend on which others are there.
    """

    function: Callable[[PairLogps, LossOptions], LossOut]
    whole_batch: bool = False
    options: frozenset[str] = field(default=frozenset())  # of DPOConfig, besides beta
    divergence: bool = False  # of the scores, and so of any f_divergence_type
    reference: bool = True  # False: of the policy's log-probabilities alone
    sums: bool = True  # of the completions' sums, to which ld_alpha applies
    weighable: bool = True  # of pairs one by one, which use_weighting can weigh
    stats: tuple[str, ...] = ()  # of the op, that it needs


def _row(function: Callable, *options: str, **facts: Any) -> Loss:
    return Loss(function=function, options=frozenset(options), **facts)


SMOOTHING = "label_smoothing"

LOSSES = {
    "sigmoid": _row(pair_losses.sigmoid, SMOOTHING, divergence=True),
    "hinge": _row(pair_losses.hinge, divergence=True),
    "ipo": _row(pair_losses.ipo, divergence=True),
    "exo_pair": _row(pair_losses.exo_pair, SMOOTHING, divergence=True),
    "nca_pair": _row(pair_losses.nca_pair),
    "robust": _row(pair_losses.robust, SMOOTHING, divergence=True),
    "bco_pair": _row(pair_losses.bco_pair, "bco_shift"),
    "sppo_hard": _row(pair_losses.sppo_hard),
    "aot": _row(batch_losses.aot, SMOOTHING, whole_batch=True, weighable=False),
    "aot_unpaired": _row(
        batch_losses.aot_unpaired, SMOOTHING, whole_batch=True, weighable=False
    ),
    "discopop": _row(pair_losses.discopop, "discopop_tau", divergence=True),
    "apo_zero": _row(pair_losses.apo_zero),
    "apo_down": _row(pair_losses.apo_down),
    "sft": _row(pair_losses.sft, sums=False, weighable=False),
    "sigmoid_norm": _row(pair_losses.sigmoid_norm, SMOOTHING, divergence=True),
    "dpop": _row(pair_losses.dpop, SMOOTHING, "dpop_lambda"),
    "simpo": _row(
        pair_losses.simpo, SMOOTHING, "simpo_gamma", reference=False, sums=False
    ),
    "orpo": _row(pair_losses.orpo, reference=False, sums=False, weighable=False),
    "cpo": _row(
        pair_losses.cpo,
        SMOOTHING,
        "cpo_alpha",
        reference=False,
        sums=False,
        weighable=False,
    ),
    "kto_pair": _row(batch_losses.kto_pair, whole_batch=True),
}

# What a loss becomes under an option.
BCO_SHIFTED = _row(batch_losses.bco_pair_shifted, "bco_shift", whole_batch=True)

ALSO_CALLED = {"aot_pair": "aot_unpaired"}  # EasyDeL's name


def total_loss(losses: dict[str, Loss], *, weighting: bool = False) -> Loss:
    """The sum of losses, by their names, each times its of `options.loss_weights`.

    Of several, the mean of each is a metric, `loss/NAME`, before its weight.

    Args:
        weighting: multiply each pair's loss by its likelihood under the policy (Zhou et
            al. 2024, arXiv:2406.11827, eq. 2).
    """

    def function(logps: PairLogps, options: LossOptions) -> LossOut:
        outs = {name: loss.function(logps, options) for name, loss in losses.items()}
        terms = [out.per_pair for out in outs.values()]
        if weighting:
            terms = [term * logps.likelihood for term in terms]
        per_pair = jnp.zeros_like(terms[0])
        for weight, term in zip(options.loss_weights, terms, strict=True):
            per_pair += weight * term
        metrics = {name: x for out in outs.values() for name, x in out.metrics.items()}
        if len(losses) > 1:
            metrics |= {
                f"loss/{name}": term for name, term in zip(losses, terms, strict=True)
            }
        rewards = [out.rewards for out in outs.values() if out.rewards is not None]
        return LossOut(per_pair, metrics, rewards[0] if rewards else None)

    rows: Sequence[Loss] = tuple(losses.values())
    return Loss(
        function=function,
        whole_batch=any(row.whole_batch for row in rows),
        reference=all(row.reference for row in rows),
        stats=("collision",) if weighting else (),
    )
