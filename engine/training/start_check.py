"""The first step checks itself: where policy and reference are the same weights.

Then both give a completion the same log-probability, but for rounding, and the loss is
what it is there. Of other references less is known. Read from the metrics of the first
step, which costs nothing.
"""

import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from engine.config.dpo import DPOConfig
from engine.errors import InputError
from engine.objective.interface import LossOptions, PairLogps
from engine.objective.losses import Loss
from engine.training.prepare import loss_options
from engine.training.step import StepOut

logger = logging.getLogger(__name__)

# Of the sums that a difference is taken of: for each nat of a log-probability and, as
# it is itself a difference of two numbers of some nats, so many for each token.
_ROUNDINGS = 4
_NATS_OF_A_TOKEN = 4


class StartCheck:
    """Of a run that begins with the reference's weights.

    Args:
        dtype: of the computation.
    """

    def __init__(self, arguments: DPOConfig, dtype: Any):
        loss, options = arguments.loss, loss_options(arguments)
        self._eps = float(jnp.finfo(dtype).eps)
        # Compiled here: nothing is during a run.
        values = jax.jit(lambda ratio: _losses(loss, options, ratio))
        self._values = values.lower(jax.ShapeDtypeStruct((), jnp.float32)).compile()

    def __call__(self, out: StepOut) -> None:
        """Say that a first step is as it should be.

        Raises:
            InputError: it is not, and in what.
        """
        sums, pairs = out.sums.sums, float(out.sums.weights["pairs"])
        bounds, worst = [], 0.0
        for side in "chosen", "rejected":
            found = float(sums[side][f"log_ratio/{side}"])
            nats = abs(float(sums["pairs"][f"logps/{side}"]))
            nats += _NATS_OF_A_TOKEN * float(out.sums.weights[side])
            bound = _ROUNDINGS * self._eps * nats
            worst = max(worst, abs(found) / bound if bound else 0.0)
            if abs(found) > bound:
                raise InputError(
                    f"step 1: log_ratio/{side} is not 0, though policy and reference "
                    f"are the same weights: the sum over the batch is {found:.4g} "
                    f"nats, and rounding explains {bound:.4g}; {_DEFECT}"
                )
            bounds.append(bound / pairs)
        shown = self._check_loss(float(sums["pairs"]["loss"]) / pairs, max(bounds))
        logger.info(
            "start check passed: the first step's log-ratios are 0 within rounding "
            "(%.2g of what it explains), and %s",
            worst,
            shown,
        )

    def _check_loss(self, found: float, ratio: float) -> str:
        *near, other = (float(x) for x in np.asarray(self._values(np.float32(ratio))))
        here = near[0]
        slack = 32 * float(jnp.finfo(jnp.float32).eps) * max(1.0, abs(here))
        if not abs(other - here) <= slack:
            return "this loss has no value of its own there"
        if not min(near) - slack <= found <= max(near) + slack:
            raise InputError(
                f"step 1: the loss is {found:.6g}, and {here:.6g} where policy and "
                f"reference are the same weights; {_DEFECT}"
            )
        return f"its loss is {here:.6g}, as there"


class ReferenceCheck:
    """Of a run whose policy and reference need not agree.

    No probability of the reference's is above 1, and a model that predicts worse than
    an even guess has not been trained, or not on these tokens.

    Args:
        vocab_size: of the models.
        dtype: of the computation.
    """

    def __init__(self, vocab_size: int, dtype: Any):
        self._guess = math.log(vocab_size)
        self._eps = float(jnp.finfo(dtype).eps)

    def __call__(self, out: StepOut) -> None:
        """Say what the first step tells.

        Raises:
            InputError: log-probabilities of the reference above 0.
        """
        sums, said = out.sums.sums, []
        for side in "chosen", "rejected":
            policy, tokens = (
                float(sums["pairs"][f"logps/{side}"]),
                float(out.sums.weights[side]),
            )
            reference = policy - float(sums[side][f"log_ratio/{side}"])
            bound = _ROUNDINGS * self._eps * (abs(policy) + _NATS_OF_A_TOKEN * tokens)
            if reference > bound:
                raise InputError(
                    f"step 1: the reference's log-probabilities of the {side} sum up "
                    f"to {reference:.4g} over the batch, above 0; {_DEFECT}"
                )
            nats = -reference / max(tokens, 1.0)
            said.append(f"{side} {-policy / max(tokens, 1.0):.3g} and {nats:.3g}")
            if nats > self._guess:
                logger.warning(
                    "step 1: the reference gives the %s answers %.3g nats a token, "
                    "worse than an even guess (%.3g): is it trained, and is it of the "
                    "tokenizer of model?",
                    side,
                    nats,
                    self._guess,
                )
        logger.info(
            "start check: nats a token of policy and reference, which are not the same "
            "weights: %s",
            ", ".join(said),
        )


_DEFECT = (
    "something is wrong with this program or with this machine: please report it with "
    "the configuration"
)


def _losses(loss: Loss, options: LossOptions, ratio: Array) -> Float[Array, " n"]:
    """The loss of log-ratios of 0, of some as far from it, and of 0 for other texts."""
    points = [(0, 0), (1, -1), (-1, 1), (1, 1), (-1, -1)]
    near = [_loss(loss, options, ratio * c, ratio * r) for c, r in points]
    zero = jnp.zeros_like(ratio)
    return jnp.stack([*near, _loss(loss, options, zero, zero, length=3.0)])


def _loss(
    loss: Loss, options: LossOptions, chosen: Array, rejected: Array, length=1.0
) -> Array:
    """Of pairs whose log-ratios are these; `length` is also the nats a token has."""
    nats = length**2

    def both(x: Any) -> Array:
        return jnp.broadcast_to(jnp.asarray(x, jnp.float32), (2,))

    logps = PairLogps(
        chosen=both(chosen - nats),
        rejected=both(rejected - 2 * nats),
        ref_chosen=both(-nats),
        ref_rejected=both(-2 * nats),
        chosen_length=both(length),
        rejected_length=both(2 * length),
        weights=both(1.0),
        whole_chosen=both(chosen - nats),
        mean_chosen_length=both(length),
        likelihood=both(1 / length),
    )
    return loss.function(logps, options).per_pair.mean()
