"""The best of a run's evaluations, and when to stop as none gets better."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from engine.config.dpo import DPOConfig
from engine.config.fields import did_you_mean
from engine.errors import InputError

logger = logging.getLogger(__name__)

_DEFAULT = "loss"
_EVAL = "eval_"
# Of which more is better. Of a loss less is; of the others nobody knows.
_GREATER = (
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "logps/chosen",
    "log_ratio/chosen",
    "mean_token_accuracy",
)


@dataclass(kw_only=True)
class Best:
    """The best evaluation so far: part of a checkpoint. That before step 1 is none."""

    step: int = 0  # after which it was; 0: there is none
    value: float = 0.0
    waited: int = 0  # evaluations since one that was better by the threshold


@dataclass(frozen=True, kw_only=True)
class BestModel:
    """How evaluations are compared."""

    metric: str  # its whole name, as it is written
    greater: bool  # whether more of it is better
    patience: int | None = None  # None: the run does not stop early
    threshold: float = 0.0

    def hear(self, best: Best, step: int, metrics: Mapping[str, float]) -> None:
        """Bring `best` up to date after an evaluation."""
        value = metrics[self.metric]
        better = best.step == 0 or (
            value > best.value if self.greater else value < best.value
        )
        better = better and not math.isnan(value)
        enough = best.step == 0 or abs(value - best.value) > self.threshold
        best.waited = 0 if better and enough else best.waited + 1
        if better:
            best.step, best.value = step, value

    def is_over(self, best: Best) -> bool:
        """Whether the run stops here."""
        return self.patience is not None and best.waited >= self.patience

    def rule(self) -> str:
        """What is the best, and when the run stops."""
        kind = "greatest" if self.greater else "least"
        if self.patience is None:
            return f"the {kind} {self.metric}"
        by = f" by {self.threshold:g}" if self.threshold else ""
        return f"the {kind} {self.metric}; stops after {self.patience} not better{by}"

    def words(self, best: Best) -> str:
        """The best evaluation."""
        if not best.step:
            return f"no evaluation had a {self.metric} that is a number"
        return f"the best {self.metric}, {best.value:.6g}, was that of step {best.step}"

    def why_over(self, best: Best) -> str:
        """Why a run stops."""
        by = f" by more than {self.threshold:g}" if self.threshold else ""
        times = f"{best.waited} evaluation{'s' * (best.waited != 1)}"
        return (
            f"{self.metric} has not been better{by} for {times}: "
            f"early_stopping_patience is {self.patience}"
        )


def best_model(
    arguments: DPOConfig, prefixes: Sequence[str], names: Iterable[str]
) -> BestModel | None:
    """How the options say that evaluations are compared; None: they are not.

    Args:
        prefixes: of the metrics' names, one for each evaluation set.
        names: of every metric, without a prefix.
    Raises:
        InputError: a metric that there is not, or of which set is not said, or whether
            more of it is better.
    """
    if arguments.comparing is None:
        return None
    whole = {f"{prefix}{name}": name for prefix in prefixes for name in names}
    given = arguments.metric_for_best_model or _DEFAULT
    metric = _whole_name(given, whole, prefixes, arguments)
    greater, name = arguments.greater_is_better, whole[metric]
    if greater is None:
        if name != "loss" and not name.startswith("loss/") and name not in _GREATER:
            raise InputError(
                f"metric_for_best_model={given!r}: whether more of it is better is not "
                "known; say so with greater_is_better, true or false"
            )
        greater = name in _GREATER
    return BestModel(
        metric=metric,
        greater=greater,
        patience=arguments.early_stopping_patience,
        threshold=arguments.early_stopping_threshold,
    )


def _whole_name(
    given: str, whole: Mapping[str, str], prefixes: Sequence[str], arguments: DPOConfig
) -> str:
    for name in (given, f"{_EVAL}{given}"):
        if name in whole:
            return name
    bare = given.removeprefix(_EVAL)
    of_sets = [name for name, short in whole.items() if short == bare]
    if len(of_sets) == 1:
        return of_sets[0]
    option = "metric_for_best_model"
    if of_sets:
        option = arguments.comparing if given == _DEFAULT else f"{option}={given!r}"
        raise InputError(
            f"{option}: there are {len(prefixes)} evaluation sets; say with "
            f"metric_for_best_model of which: {' or '.join(of_sets)}"
        )
    near = did_you_mean(given, [*whole, *whole.values()])
    known = near or f"; known: {', '.join(dict.fromkeys(whole.values()))}"
    raise InputError(f"{option}={given!r}: evaluations have no such metric{known}")
