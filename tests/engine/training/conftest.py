"""What tests of training share."""

import dataclasses
from collections.abc import Hashable, Iterable
from typing import Any

import jax
import pytest

from engine.data.shapes import Sizes
from engine.training.compilation import Compiled
from engine.training.programs import Programs

# Options of what a run does between its steps; how many there are is in its plan.
BETWEEN_STEPS = {
    *("save_directory", "save_steps", "save_interval_minutes", "save_total_limit"),
    *("save_dtype", "resume", "log_steps", "eval_steps", "eval_on_start"),
    *("max_training_steps", "num_train_epochs", "max_skipped_steps"),
    *("metric_for_best_model", "greater_is_better", "load_best_model_at_end"),
    *("early_stopping_patience", "early_stopping_threshold"),
    *("generation_num_prompts", "generation_max_new_tokens", "generation_temperature"),
    *("use_tensorboard", "use_wandb", "progress_bar", "start_check"),
}
_kept: dict[Hashable, Compiled | None] = {}


def _made_of(programs: Programs, plans: Iterable[Sizes]) -> Hashable:
    """All that a step of these batches depends on: options, models and shapes."""
    run, reference = programs._run, programs._reference
    options: list[Any] = [
        (field.name, getattr(run.arguments, field.name))
        for field in dataclasses.fields(run.arguments)
        if field.name not in BETWEEN_STEPS
    ]
    arrays = programs.abstract_state, programs.frozen, reference.operands
    leaves, structure = jax.tree.flatten(arrays)
    return (
        *(repr(options), run.mesh, run.reads_values, run.plan.steps),
        *(programs.graphdef, programs._model.config, type(reference)),
        *(getattr(reference, name, None) for name in ("_graphdef", "_decoder")),
        *(structure, tuple((x.shape, x.dtype, x.sharding) for x in leaves)),
        tuple((*plan.shapes, plan.grid) for plan in plans),
    )


@pytest.fixture(scope="module")
def shared_programs():
    """Runs that are made of the same share what they compile.

    Two thirds of a run's time is to trace and lower it again, to find the program that
    is kept already. For modules whose tests change nothing of which a step is made.
    """
    compile_run = Programs.compile

    def compile_once(self: Programs, *, training: bool) -> None:
        train = "train", _made_of(self, [self._run.plan])
        evaluation = "evaluation", _made_of(self, self._run.eval_plans.values())
        if training and self._train is None:
            self._train = _kept.get(train)
        if self._evaluation is None:
            self._evaluation = _kept.get(evaluation)
        compile_run(self, training=training)
        _kept.setdefault(evaluation, self._evaluation)
        if training:
            _kept.setdefault(train, self._train)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Programs, "compile", compile_once)
        yield
