"""Runs that are cut off and go on: the same metrics, the same weights."""

import errno
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from engine import DPOTrainer, LoraConfig, load_model
from engine.errors import InputError
from engine.training import checkpoints
from engine.training.checkpoints import Store
from tests.engine.training.runs import FIXTURE, SHORT, make_trainer, one_device
from tests.json_lines import read_lines

pytestmark = pytest.mark.usefixtures("shared_programs")
EVERY = {"save_steps": 1, "save_total_limit": None}
# 11 pairs: epochs of 2 whole batches and one of 3 pairs; lines average over 2 steps.
SETTINGS: dict[str, Any] = {"num_train_epochs": 2, "train_dataset": SHORT} | EVERY
FORMS: dict[str, dict[str, Any]] = {
    "evaluations": {"eval_steps": 2},
    "accumulation": {
        "gradient_accumulation_steps": 2,
        "evaluate": False,
        "nu_dtype": "bfloat16",
        "lr_scheduler_type": "constant",
    },
    "lora": {
        "lora": LoraConfig(r=8, lora_alpha=4),
        "evaluate": False,
        "mu_dtype": "8bit",
        "nu_dtype": "8bit",
    },
    "synced": {"sync_ref_model": True, "ref_model_sync_steps": 2, "evaluate": False},
}


def settings(form: str) -> dict[str, Any]:
    return SETTINGS | FORMS[form]


def lines(directory: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, but for what a clock says."""
    return [
        {name: x for name, x in line.items() if "perf/" not in name}
        for line in read_lines(directory / "metrics.jsonl")
    ]


def weights(trainer: DPOTrainer) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(nnx.state(trainer.model))]


def as_killed(whole: Path, directory: Path, step: int) -> Path:
    """What a run that was killed some time after saving a step has left."""
    for path in (whole / "checkpoints").glob("step-*"):
        if path.name <= f"step-{step:08d}":
            shutil.copytree(path, directory / "checkpoints" / path.name)
    shutil.copy(whole / "metrics.jsonl", directory)
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folders and weights of runs that nothing has disturbed."""
    found: dict[str, tuple[Path, list[bytes]]] = {}

    def run(form: str) -> tuple[Path, list[bytes]]:
        if form not in found:
            directory = tmp_path_factory.mktemp(form)
            trainer = make_trainer(directory, **settings(form))
            trainer.train()
            found[form] = directory, weights(trainer)
        return found[form]

    return run


@pytest.mark.parametrize(
    ("form", "step"),
    [
        ("evaluations", 1),  # in the middle of a line of metrics
        ("evaluations", 2),  # behind a line and an evaluation
        ("evaluations", 3),  # the end of an epoch
        ("evaluations", 6),  # the end of the run, with its model unsaved
        ("accumulation", 4),
        ("lora", 3),
        ("synced", 3),  # the reference has moved once
    ],
)
def test_a_run_goes_on_to_the_bit(whole, tmp_path, form, step):
    directory, trained = whole(form)
    cut = as_killed(directory, tmp_path / "cut", step)
    trainer = make_trainer(cut, **settings(form))
    trainer.train()
    assert lines(cut) == lines(directory)
    assert weights(trainer) == trained
    assert trainer.progress.step == 6 and trainer.progress.window.steps == []


def test_a_finished_run_says_so(whole, tmp_path):
    directory, _ = whole("evaluations")
    again = as_killed(directory, tmp_path / "again", 6)
    shutil.copy(directory / "checkpoints" / "finished.json", again / "checkpoints")
    before = contents(again)
    with pytest.raises(InputError, match=r"all 6 steps .* are done, .* another save_d"):
        make_trainer(again, **settings("evaluations")).train()
    assert contents(again) == before


def test_anew_in_an_empty_directory_only(whole, tmp_path):
    directory, _ = whole("evaluations")
    full = as_killed(directory, tmp_path / "full", 2)
    before = contents(full)
    with pytest.raises(InputError, match="has 'checkpoints', and resume=False begins"):
        make_trainer(full, **settings("evaluations"), resume=False).train()
    assert contents(full) == before


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"beta": 0.2}, "trainer.beta was 0.1 and is 0.2;"),
        ({"loss_type": "ipo"}, "trainer.loss_type was 'sigmoid' and is 'ipo';"),
        ({"learning_rate": 1e-4}, r"trainer.learning_rate was 0.001 and is 0.0001;"),
        ({"seed": 1}, "trainer.seed was 42 and is 1;"),
        ({"total_batch_size": 2}, "trainer.total_batch_size was 4 and is 2;"),
        ({"optimizer": "sgd"}, "trainer.optimizer was 'adamw' and is 'sgd';"),
        # The schedule, a linear one, would end elsewhere.
        ({"num_train_epochs": 3}, "trainer.num_train_epochs was 2 and is 3;"),
        ({"train_dataset": SHORT[:10]}, "data was '11 pairs, .* and is '10 pairs"),
        ({"lora": LoraConfig(r=2)}, r"lora.r was not given and is 2 \(and \d+ more\)"),
        ({"beta": 0.2, "seed": 1}, r"trainer.beta was .* \(and 1 more\); a run goes"),
    ],
)
def test_another_run_than_the_checkpoints(whole, tmp_path, change, said):
    directory, _ = whole("evaluations")
    cut = as_killed(directory, tmp_path / "cut", 2)
    before = contents(cut)
    with pytest.raises(InputError, match=f"step-00000002 is of another run: {said}"):
        make_trainer(cut, **settings("evaluations") | change).train()
    assert contents(cut) == before


def test_another_reference_than_the_checkpoints(whole, tmp_path):
    directory, _ = whole("evaluations")
    cut = as_killed(directory, tmp_path / "cut", 2)
    other = load_model(FIXTURE / "model", mesh=one_device(), dtype="float32")
    params = nnx.state(other)
    nnx.update(other, jax.tree.map(lambda x: x * 1.0001, params))
    options: dict[str, Any] = settings("evaluations") | {"reference_model": other}
    with pytest.raises(InputError, match="the reference's, are not those that it bega"):
        make_trainer(cut, **options).train()


def test_harmless_changes_go_on_with_a_line(whole, tmp_path, caplog):
    directory, trained = whole("evaluations")
    cut = as_killed(directory, tmp_path / "cut", 4)
    options: dict[str, Any] = settings("evaluations") | {
        "log_steps": 3,
        "save_total_limit": 1,
    }
    trainer = make_trainer(cut, **options)
    with caplog.at_level(logging.INFO, logger="engine"):
        trainer.train()
    assert "trainer.log_steps was 2 and is 3" in caplog.text
    assert "trainer.save_total_limit was None and is 1" in caplog.text
    assert weights(trainer) == trained
    steps = [x["step"] for x in lines(cut) if "eval_loss" not in x]
    assert steps == [2, 4, 6]
    assert [path.name for path in (cut / "checkpoints").glob("step-*")] == [
        "step-00000006"
    ]


def test_more_steps_where_the_schedule_has_no_end(whole, tmp_path):
    options, (_, trained) = settings("accumulation"), whole("accumulation")
    short = tmp_path / "short"
    make_trainer(short, **options, max_training_steps=3).train()
    more = make_trainer(short, **options)
    more.train()
    assert weights(more) == trained
    # The line of step 3 alone ends the shorter run.
    assert [x["step"] for x in lines(short)] == [2, 3, 4, 6]
    fewer = make_trainer(short, **options, max_training_steps=2)
    with pytest.raises(InputError, match="is beyond the 2 steps of this run"):
        fewer.train()


def test_metrics_that_are_gone_are_said_to_be(whole, tmp_path, caplog):
    directory, trained = whole("evaluations")
    cut = as_killed(directory, tmp_path / "cut", 4)
    (cut / "metrics.jsonl").unlink()
    trainer = make_trainer(cut, **settings("evaluations"))
    trainer.train()
    assert "metrics.jsonl has 0 bytes, and had" in caplog.text
    assert weights(trainer) == trained
    assert lines(cut) == lines(directory)[-2:]


# Damage, of each file in turn.


def deleted(path: Path) -> None:
    path.unlink()


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


@pytest.mark.parametrize("damage", [deleted, truncated, altered, longer])
def test_damage_is_found_in_every_file(whole, tmp_path, damage):
    directory, _ = whole("evaluations")
    cut = as_killed(directory, tmp_path / "cut", 2)
    store = Store(cut, None)
    assert store.newest() == (2, [])
    kept = store.path(2)
    files = [path for path in kept.rglob("*") if path.is_file()]
    assert len(files) > 8
    for file in files:
        before = file.read_bytes()
        if not before and damage in (truncated, altered):
            continue
        damage(file)
        name = re.escape(file.relative_to(kept).as_posix())
        assert re.match(f"{name} (is missing|has )", store.damage(2) or "")
        assert store.newest() == (1, [2])
        file.write_bytes(before)
    assert store.damage(2) is None


def test_the_newest_good_one_is_used_and_the_damaged_one_kept(whole, tmp_path, caplog):
    directory, trained = whole("evaluations")
    cut = as_killed(directory, tmp_path / "cut", 3)
    deleted(cut / "checkpoints" / "step-00000003" / "run.json")
    trainer = make_trainer(cut, **settings("evaluations"))
    trainer.train()
    assert "step-00000003: run.json is missing; it is not used" in caplog.text
    assert "going back to the checkpoint of step 2" in caplog.text
    assert weights(trainer) == trained
    assert lines(cut) == lines(directory)
    aside = cut / "checkpoints" / "damaged-step-00000003.1"
    assert (aside / "manifest.json").is_file()
    assert (cut / "checkpoints" / "step-00000003").is_dir()


def test_no_good_checkpoint_is_an_error_and_nothing_is_changed(whole, tmp_path):
    directory, _ = whole("evaluations")
    cut = as_killed(directory, tmp_path / "cut", 2)
    for path in (cut / "checkpoints").iterdir():
        truncated(path / "manifest.json")
    before = contents(cut)
    with pytest.raises(InputError, match=r"no checkpoint that is whole \(.* of step 2"):
        make_trainer(cut, **settings("evaluations")).train()
    assert contents(cut) == before


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_fails_the_save_and_training_goes_on(
    whole, tmp_path, caplog, monkeypatch
):
    _, trained = whole("evaluations")
    write, calls = checkpoints._write, []

    def sometimes_full(path: Path, text: str) -> None:
        calls.append(path)
        if "step-00000002" in str(path) or "step-00000003" in str(path):
            full_disk()
        write(path, text)

    monkeypatch.setattr(checkpoints, "_write", sometimes_full)
    trainer = make_trainer(tmp_path, **settings("evaluations"))
    trainer.train()
    assert weights(trainer) == trained
    found = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert found == [
        "finished.json",
        *(f"step-0000000{step}" for step in (1, 4, 5, 6)),
    ]
    (said, _) = [x.getMessage() for x in caplog.records if x.levelname == "ERROR"]
    assert re.fullmatch(
        r".*step-00000002: the checkpoint cannot be written: No space left on device;"
        " free some space, or see save_directory; that of step 1 is kept, and training "
        "goes on",
        said,
    )
