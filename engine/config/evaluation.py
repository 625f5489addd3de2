"""Options of evaluations during training, and of what follows from them."""

import dataclasses
from dataclasses import dataclass

from engine.config.fields import check_count, check_unused, check_within
from engine.errors import InputError

# Those that are nothing without held-out pairs. (What compares evaluations asks for
# eval_steps.)
_OF_HELD_OUT_PAIRS = ("eval_steps", "eval_batch_size", "eval_on_start")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Options of evaluations during training, and of the best model by one of them.

    Names and meanings are those of transformers.
    """

    eval_on_start: bool = False  # evaluate before the first step too

    # What evaluations are compared by: a metric's name, `eval_` in front or not, and
    # with the name of its set where there are several. The checkpoint of the best one
    # is saved and kept. None: loss, where an option below compares.
    metric_for_best_model: str | None = None
    greater_is_better: bool | None = None  # None: as the metric's name says
    load_best_model_at_end: bool = False  # save that model, not the last step's
    # Evaluations in a row without a better one after which the run ends.
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0  # by how much a better one must be better

    @property
    def comparing(self) -> str | None:
        """The option for which evaluations are compared, or None."""
        for name, given in (
            ("metric_for_best_model", self.metric_for_best_model is not None),
            ("load_best_model_at_end", self.load_best_model_at_end),
            ("early_stopping_patience", self.early_stopping_patience is not None),
        ):
            if given:
                return f"{name}={getattr(self, name)!r}"
        return None

    def without_effect_alone(self) -> str | None:
        """The first option that is given and needs held-out pairs, or None."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in _OF_HELD_OUT_PAIRS:
            if (value := getattr(self, name)) != defaults[name]:
                return f"{name}={value!r}"
        return None

    def _check_evaluation(self, eval_steps: int | None) -> None:
        if self.metric_for_best_model == "":
            raise InputError("metric_for_best_model='' must not be empty")
        check_count(self, "early_stopping_patience")
        check_within(self, 0, float("inf"), "early_stopping_threshold")
        if self.early_stopping_patience is None:
            reason = "without early_stopping_patience"
            check_unused(self, reason, "early_stopping_threshold")
        if self.metric_for_best_model is None:
            reason = "without metric_for_best_model"
            check_unused(self, reason, "greater_is_better")
        if self.comparing and eval_steps is None:
            raise InputError(
                f"{self.comparing} compares the evaluations of a run, and without "
                "eval_steps there is one, at the end; give eval_steps, the optimizer "
                "steps between two"
            )
