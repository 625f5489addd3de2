"""The best evaluation: which it is, that it is kept and saved, and that a run stops."""

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from engine import DPOTrainer, load_model
from engine.errors import InputError
from engine.training import checkpoints
from engine.training.checkpoints import Store
from tests.engine.training.runs import SHORT, make_trainer, one_device
from tests.json_lines import read_lines

pytestmark = pytest.mark.usefixtures("shared_programs")

# A rate so high that the loss of held-out pairs has its least value early.
SETTINGS: dict[str, Any] = {
    "train_dataset": SHORT,
    "num_train_epochs": 3,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "eval_steps": 1,
    "log_steps": 4,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
}


def but(**changes: Any) -> dict[str, Any]:
    return SETTINGS | changes


def weights(trainer: DPOTrainer) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(nnx.state(trainer.model))]


def lines(directory: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, but for what a clock says."""
    return [
        {name: x for name, x in line.items() if "perf/" not in name}
        for line in read_lines(directory / "metrics.jsonl")
    ]


def losses(directory: Path) -> dict[int, float]:
    found = read_lines(directory / "metrics.jsonl")
    return {x["step"]: x["eval_loss"] for x in found if "eval_loss" in x}


def saved(directory: Path) -> list[int]:
    return Store(directory, None).steps()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run to the end, every checkpoint kept, its log, weights and evaluations."""
    directory = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(directory, **but(save_total_limit=None), eval_on_start=True)
    trainer.train()
    found = losses(directory)
    best = min((step for step in found if step), key=lambda step: found[step])
    assert 1 < best < max(found), "the test wants the best one in the middle"
    return directory, weights(trainer), best


def test_evaluations_have_that_before_the_first_step(whole):
    directory, _, _ = whole
    first = read_lines(directory / "metrics.jsonl")[0]
    assert (first["step"], first["epoch"]) == (0, 0)
    assert first["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert list(losses(directory)) == list(range(10))


def test_each_new_best_has_a_checkpoint(whole):
    directory, _, best = whole
    found, least, want = losses(directory), float("inf"), []
    for step in range(1, 10):
        if found[step] < least:
            least = found[step]
            want.append(step)
    # The run saves, so its last step too.
    assert want[-1] == best and saved(directory) == [*want, 9]


def test_the_best_model_is_the_one_that_is_saved(whole):
    directory, trained, best = whole
    arrays = Store(directory, None).path(best) / "arrays"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # shardings are as they were saved
        found = checkpoints._checkpoint_library().load(arrays)
    params = [x for name, x in found.items() if name.startswith("state.params")]
    assert sorted(trained) == sorted(np.asarray(x).tobytes() for x in params)
    model = load_model(directory, mesh=one_device(), dtype="float32")
    leaves = jax.tree.leaves(nnx.state(model))
    assert trained == [np.asarray(x).tobytes() for x in leaves]


def test_the_best_is_never_removed_and_a_run_goes_on_to_the_bit(
    whole, tmp_path, caplog
):
    directory, trained, best = whole
    # Killed two steps behind the best one, of which alone there is a checkpoint.
    cut = tmp_path / "cut"
    name = f"step-{best:08d}"
    shutil.copytree(directory / "checkpoints" / name, cut / "checkpoints" / name)
    shutil.copy(directory / "metrics.jsonl", cut)
    trainer = make_trainer(cut, **SETTINGS, save_steps=1, eval_on_start=True)
    with caplog.at_level(logging.INFO, "engine"):
        trainer.train()
    assert lines(cut) == lines(directory)
    assert weights(trainer) == trained
    assert saved(cut) == [best, 9]  # the best one is more than the limit of one
    loss = f"{losses(directory)[best]:.6g}"
    assert f"the best eval_loss, {loss}, was that of step {best}: the mo" in caplog.text


def test_a_best_one_that_is_damaged_is_said(whole, tmp_path, caplog):
    directory, trained, best = whole
    shutil.copytree(directory / "checkpoints", tmp_path / "checkpoints")
    shutil.copy(directory / "metrics.jsonl", tmp_path)
    (tmp_path / "checkpoints" / "finished.json").unlink()
    (tmp_path / "checkpoints" / f"step-{best:08d}" / "manifest.json").unlink()
    trainer = make_trainer(tmp_path, **SETTINGS, eval_on_start=True)
    trainer.train()
    assert weights(trainer) != trained
    assert "cannot be loaded (manifest.json is missing): the model is" in caplog.text


def test_a_run_stops_early_and_goes_on_with_more_patience(whole, tmp_path, caplog):
    directory, trained, best = whole
    settings = but(early_stopping_patience=2, eval_on_start=True)
    trainer = make_trainer(tmp_path, **settings)
    with caplog.at_level(logging.INFO, "engine"):
        trainer.train()
    last = best + 2
    assert max(losses(tmp_path)) == last < 9
    assert (
        f"step {last}: eval_loss has not been better for 2 evaluations" in caplog.text
    )
    assert weights(trainer) == trained
    ends = [x["step"] for x in lines(tmp_path) if "loss" in x]
    assert ends[-1] == last  # no step is in no line
    assert saved(tmp_path) == [best, last]
    with pytest.raises(InputError, match=f"stopped after step {last} .* larger ear"):
        make_trainer(tmp_path, **settings).train()

    # Killed as it stopped, before its model was saved.
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "checkpoints", cut / "checkpoints")
    (cut / "checkpoints" / "finished.json").unlink()
    shutil.copy(tmp_path / "metrics.jsonl", cut)
    again = make_trainer(cut, **settings)
    again.train()
    assert max(losses(cut)) == last and weights(again) == trained
    assert (cut / "model.safetensors").exists()

    on = make_trainer(tmp_path, **but(early_stopping_patience=9, eval_on_start=True))
    on.train()
    assert weights(on) == trained
    assert losses(tmp_path) == losses(directory)


def test_what_needs_the_run_is_refused_before_it(tmp_path):
    with pytest.raises(InputError, match="eval_on_start=True has no effect without"):
        make_trainer(tmp_path, evaluate=False, eval_on_start=True)
    with pytest.raises(InputError, match="eval_steps=9 there is one, .* its 9 steps;"):
        make_trainer(tmp_path, **but(eval_steps=9))
    sets = {"one": SHORT[:2], "two": SHORT[2:4]}
    with pytest.raises(InputError, match="which: eval_one_loss or eval_two_loss"):
        make_trainer(tmp_path, **SETTINGS, eval_dataset=sets)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (1, 2, [2, 5]),
        (2, 2, [2, 5]),
        (3, 2, [2, 4, 5]),
        (2, 5, [4, 5]),
        (1, 5, [5]),
        (2, None, [4, 5]),
        (None, 2, [1, 2, 3, 4, 5]),
    ],
)
def test_which_checkpoints_go(tmp_path, limit, best, left):
    store = Store(tmp_path, limit, lambda step, facts: step == best)
    for step in range(1, 6):
        store.path(step).mkdir(parents=True)
        (store.path(step) / "run.json").write_text(json.dumps({}))
    (store.path(3) / "run.json").unlink()  # a damaged one is no obstacle
    gone = store._too_many()
    assert [step for step in store.steps() if step not in gone] == left
