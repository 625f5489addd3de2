"""Steps whose loss is not finite: the run ends, or goes on without them."""

from typing import Any

import jax
import numpy as np
import pytest

from engine.training.evaluation import NotFinite
from tests.engine.training.runs import SHORT, make_trainer
from tests.engine.training.test_checkpoints import weights
from tests.json_lines import read_lines

pytestmark = pytest.mark.usefixtures("shared_programs")

# The sum of two such weights is infinite in float32: of rows 4 and 5, and so of step 2.
BAD: list[Any] = [
    row | {"weight": 3e38 if i in (4, 5) else 1.0} for i, row in enumerate(SHORT)
]
SETTINGS: dict[str, Any] = {
    "train_dataset": BAD,
    "shuffle_train_dataset": False,
    "num_train_epochs": 1,
    "lr_scheduler_type": "constant",
    "evaluate": False,
    "log_steps": 1,
}


def test_a_run_ends_and_names_the_rows_and_keeps_the_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, save_steps=1, **SETTINGS)
    with pytest.raises(NotFinite) as caught:
        trainer.train()
    said, kept = str(caught.value), tmp_path / "checkpoints" / "step-00000001"
    assert said.startswith("step 2: the loss is nan, and ")
    assert "(logps/chosen is the first that is not finite)" in said
    assert "(its pairs: rows 4, 5, 6, 7, from 0)" in said
    assert f"the newest checkpoint is {kept}, from which on_nonfinite=skip goes" in said
    assert caught.value.exit_code == 3
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    assert not (tmp_path / "model.safetensors").exists()
    # As it says:
    skipping = make_trainer(tmp_path, save_steps=1, on_nonfinite="skip", **SETTINGS)
    skipping.train()
    anew = make_trainer(tmp_path / "anew", on_nonfinite="skip", **SETTINGS)
    anew.train()
    assert weights(skipping) == weights(anew)


def test_a_skipped_step_changes_nothing_but_the_count(tmp_path, caplog):
    one, two = (
        make_trainer(
            tmp_path / str(n), on_nonfinite="skip", max_training_steps=n, **SETTINGS
        )
        for n in (1, 2)
    )
    one.train()
    two.train()
    assert weights(one) == weights(two)
    moments = [jax.tree.leaves(jax.device_get(x.state.opt_state)) for x in (one, two)]
    assert all(np.array_equal(a, b) for a, b in zip(*moments, strict=True))
    assert int(two.state.step) == two.progress.step == 2
    lines = read_lines(tmp_path / "2" / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [0, 1]
    assert lines[0]["loss"] is not None and lines[1]["loss"] is None
    assert "rows 4, 5, 6, 7, from 0); this update is left out" in caplog.text


def test_too_many_skipped_steps_end_the_run(tmp_path):
    options: dict[str, Any] = SETTINGS | {"num_train_epochs": 2, "max_skipped_steps": 1}
    trainer = make_trainer(tmp_path, on_nonfinite="skip", **options)
    with pytest.raises(
        NotFinite, match="step 5: .*; 1 updates were left out before, as"
    ):
        trainer.train()
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["step"] == 5
