"""The loss that a run's options make, and which of them mean something together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.config.fields import check_choice, check_positive, check_unused
from engine.errors import InputError
from engine.objective.interface import Divergence
from engine.objective.losses import (
    ALSO_CALLED,
    BCO_SHIFTED,
    LOSSES,
    SMOOTHING,
    Loss,
    total_loss,
)

EXO_SMOOTHING = 1e-3  # of exo_pair, which is infinite at 0: its paper's


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Options of the loss; docs/losses.md has the formulas.

    The reward of a completion is beta * (policy - reference) log-probability.
    """

    beta: float = 0.1  # strength of the pull towards the reference, > 0
    # A name in engine.objective.losses.LOSSES, or several, whose sum is the loss.
    loss_type: str | tuple[str, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None  # of each loss_type; None: 1
    rpo_alpha: float | None = None  # add so much of the loss sft (RPO)
    label_smoothing: float = 0.0  # probability that a label is wrong, in [0, 0.5)
    discopop_tau: float = 0.05  # discopop: width of the blend, > 0 and <= 1
    dpop_lambda: float = 50.0  # dpop: weight of a chosen answer that has become rarer
    simpo_gamma: float = 0.5  # simpo: margin that the rewards are to have
    cpo_alpha: float = 1.0  # cpo: weight of its sft term
    # bco_pair: what is taken off all rewards. batch_mean is EasyDeL's.
    bco_shift: Literal["none", "batch_mean"] = "none"
    # What keeps the policy near the reference: see engine.objective.divergences.
    f_divergence_type: Divergence = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5  # alpha of alpha_divergence
    # LD-DPO: weight in [0, 1] of tokens past the length of the pair's shorter answer.
    ld_alpha: float | None = None
    use_weighting: bool = False  # WPO: weigh pairs by their likelihood under the policy

    @property
    def losses(self) -> dict[str, float]:
        """The weight of each loss of the sum, rpo_alpha's too, by its name."""
        names = [ALSO_CALLED.get(name, name) for name in _names(self)]
        weights = self.loss_weights or [1.0] * len(names)
        losses = dict(zip(names, weights, strict=True))
        if self.rpo_alpha is not None:
            losses["sft"] = self.rpo_alpha
        return losses

    @property
    def loss(self) -> Loss:
        """What is minimised, but for its numbers."""
        return total_loss(_rows(self), weighting=self.use_weighting)

    @property
    def smoothing(self) -> float:
        """label_smoothing; for 0 with exo_pair, what that takes in its place."""
        if "exo_pair" in self.losses and not self.label_smoothing:
            return EXO_SMOOTHING
        return self.label_smoothing

    def check_loss(self) -> None:
        """Refuse options of the loss that mean nothing, alone or together.

        Raises:
            InputError: naming the option, and what it does not go with.
        """
        _check_names(self)
        rows = _rows(self)
        _check_options(self, rows)
        _check_sum(rows)
        _check_divergence(self, rows)
        if self.ld_alpha is not None:
            if not 0 <= self.ld_alpha <= 1:
                raise InputError(
                    f"ld_alpha={self.ld_alpha!r} must be within 0 and 1, the weight of "
                    "tokens past the length of the shorter completion (1: as the rest)"
                )
            if not any(row.sums for row in rows.values()):
                check_unused(self, f"with {_shown(rows)}", "ld_alpha")
        for name, row in rows.items():
            if self.use_weighting and not row.weighable:
                rpo = name == "sft" and self.rpo_alpha is not None
                raise InputError(
                    "use_weighting=True weighs pairs one by one, and the loss of "
                    f"{'rpo_alpha' if rpo else repr(name)} is not a sum over pairs; "
                    "remove one of them"
                )


def _names(config: LossConfig) -> Sequence[str]:
    names = config.loss_type
    return (names,) if isinstance(names, str) else names


def _rows(config: LossConfig) -> dict[str, Loss]:
    rows = {name: LOSSES[name] for name in config.losses}
    if config.bco_shift != "none" and "bco_pair" in rows:
        rows["bco_pair"] = BCO_SHIFTED
    return rows


def _shown(rows: Mapping[str, Loss]) -> str:
    names = " and ".join(repr(name) for name in rows)
    return f"loss_type {names}"


def _check_names(config: LossConfig) -> None:
    names = _names(config)
    if not names:
        raise InputError("loss_type=[] must name at least one loss")
    for name in names:
        check_choice("loss_type", name, (*LOSSES, *ALSO_CALLED))
    weights = config.loss_weights
    if weights is not None and len(weights) != len(names):
        raise InputError(
            f"loss_weights has {len(weights)} entries, but loss_type names "
            f"{len(names)}; give one weight for each loss"
        )
    if weights is not None and min(weights) <= 0:
        raise InputError(f"loss_weights={list(weights)} must all be greater than 0")
    if len({ALSO_CALLED.get(name, name) for name in names}) < len(names):
        raise InputError(f"loss_type={list(names)} names a loss twice; give it once")
    check_positive(config, "rpo_alpha")
    if config.rpo_alpha is not None and "sft" in names:
        raise InputError(
            f"rpo_alpha={config.rpo_alpha!r} adds the loss 'sft', which loss_type has "
            "already; remove one, and weigh it by the other"
        )


def _check_options(config: LossConfig, rows: Mapping[str, Loss]) -> None:
    every = frozenset[str]().union(*(loss.options for loss in LOSSES.values()))
    meant = frozenset[str]().union(*(row.options for row in rows.values()))
    check_unused(config, f"with {_shown(rows)}", *sorted(every - meant))
    check_positive(config, "discopop_tau")
    if config.discopop_tau > 1:
        raise InputError(
            f"discopop_tau={config.discopop_tau!r} must be at most 1: above it the "
            "loss of a wrong pair grows exponentially with its margin"
        )
    for name in ("dpop_lambda", "simpo_gamma", "cpo_alpha"):
        if getattr(config, name) < 0:
            raise InputError(f"{name}={getattr(config, name)!r} must be at least 0")
    if "exo_pair" in rows:
        others = [n for n, row in rows.items() if SMOOTHING in row.options]
        if len(others) > 1 and not config.label_smoothing:
            raise InputError(
                "label_smoothing=0.0 makes exo_pair infinite, and it is shared with "
                f"{' and '.join(n for n in others if n != 'exo_pair')}; give one above "
                f"0, such as {EXO_SMOOTHING}"
            )


def _check_sum(rows: Mapping[str, Loss]) -> None:
    free = [name for name, row in rows.items() if not row.reference]
    measured = [n for n, row in rows.items() if row.reference and n != "sft"]
    if free and measured:
        raise InputError(
            f"loss_type {free[0]!r} is of the policy alone and {measured[0]!r} is "
            "measured from a reference; their rewards mean different things: give one "
            "of them"
        )
    if free and (len(free) > 1 or "cpo" in free or "orpo" in free) and len(rows) > 1:
        raise InputError(
            f"loss_type {' and '.join(map(repr, rows))} cannot be added up: "
            f"{free[0]!r} is a whole objective; give it alone"
        )


def _check_divergence(config: LossConfig, rows: Mapping[str, Loss]) -> None:
    kind = config.f_divergence_type
    if kind != "alpha_divergence":
        reason = f"with f_divergence_type {kind!r}"
        check_unused(config, reason, "f_alpha_divergence_coef")
    if kind == "reverse_kl":
        return
    able = ", ".join(name for name, loss in LOSSES.items() if loss.divergence)
    for name, row in rows.items():
        if not row.divergence and (name != "sft" or len(rows) == 1):
            raise InputError(
                f"f_divergence_type={kind!r} has no meaning with loss_type {name!r}; "
                f"it has one with {able}"
            )
