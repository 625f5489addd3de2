"""Options of evaluations during training, and of what follows from them."""

import dataclasses
from dataclasses import dataclass

from engine.config.fields import check_count, check_unused, check_within
from engine.errors import InputError

# Those that are nothing without held-out pairs. (What compares evaluations asks for
# eval_steps.)
_OF_HELD_OUT_PAIRS = (
    "eval_steps",
    "eval_batch_size",
    "eval_on_start",
    "generation_num_prompts",
)
_MOST_PROMPTS = 1024  # which are continued all at once


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Options of evaluations: when, the best model by one of them, texts at each.

    Names are those of transformers, and of EasyDeL for what is generated.
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

    # Held-out prompts of each evaluation set that policy and reference answer at each
    # evaluation, in generations.jsonl. 0: none. There is no cache of keys and values: a
    # token costs a pass forward over all of them.
    generation_num_prompts: int = 0
    generation_max_new_tokens: int = 64  # of an answer
    generation_temperature: float = 0.0  # 0: the likeliest token each time

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
        check_within(self, 0, _MOST_PROMPTS + 1, "generation_num_prompts")
        check_count(self, "generation_max_new_tokens")
        check_within(self, 0, float("inf"), "generation_temperature")
        if not self.generation_num_prompts:
            names = "generation_max_new_tokens", "generation_temperature"
            check_unused(self, "without generation_num_prompts", *names)
        if self.comparing and eval_steps is None:
            raise InputError(
                f"{self.comparing} compares the evaluations of a run, and without "
                "eval_steps there is one, at the end; give eval_steps, the optimizer "
                "steps between two"
            )
