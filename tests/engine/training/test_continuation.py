"""What `dpo validate` and `dpo train` refuse before weights: another run to go on."""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest
import yaml

from engine.cli import main
from engine.commands import inputs, train
from engine.config.run import ShardingConfig, load_run_config
from engine.training.checkpoints import Store
from engine.training.continuation import configuration
from engine.training.identity import flat
from tests.engine.checkpoints import contents
from tests.engine.training.runs import FIXTURE, SHORT, one_device


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Exit code and words of a command, for a run of which there is a checkpoint.

    Its arrays are none of a model's: only a run that goes on reads them.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ShardingConfig, "mesh", lambda _: one_device())

    def no_weights(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(train, "load_models", no_weights)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SHORT))
    config = {
        "model": {"name_or_path": str(FIXTURE / "model"), "dtype": "float32"},
        "mixture": {"informs": [{"data_files": "pairs.jsonl"}]},
        "trainer": {"save_directory": "out", "total_batch_size": 4},
    }
    Path("run.yaml").write_text(yaml.safe_dump({"config": config}))

    def go(command: str, *overrides: str) -> tuple[int, str]:
        code = main([command, "run.yaml", *overrides])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return go


def leave_checkpoint(step: int = 2, *overrides: str) -> Path:
    """As a run of run.yaml would, but for the arrays."""
    run = load_run_config("run.yaml", list(overrides))
    values = configuration(inputs.prepare_run(run), flat(run))
    store = Store(Path("out"), None)
    facts = {"identity": {"config": values, "weights": "none"}}
    assert store.save(step, {"x": jnp.zeros(1)}, facts) and store.close()
    return store.path(step)


def test_what_it_would_go_on_from_is_said(run):
    path = leave_checkpoint()
    code, said = run("validate")
    assert code == 0 and f"goes on     from {path}\n" in said
    code, said = run("validate", "trainer.log_steps=3", "model.remat=none")
    assert code == 0
    assert "trainer.log_steps was 10 and is 3" in said
    assert "model.remat was 'full' and is 'none'" in said


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.beta=0.2"], "trainer.beta was 0.1 and is 0.2; a run goes on"),
        (["model.dtype=bfloat16"], "model.dtype was 'float32' and is 'bfloat16'; a r"),
        (["trainer.max_length=20"], "trainer.max_length was 512 and is 20 (and 1 mo"),
        (["mixture.informs.0.num_rows=9"], "mixture.informs.0.num_rows was None and"),
        (["trainer.num_train_epochs=1"], "trainer.num_train_epochs was 3 and is 1;"),
    ],
)
def test_another_run_is_refused_before_any_weight(run, overrides, said):
    path = leave_checkpoint()
    before = contents(Path("out"))
    for command in ("validate", "train"):
        code, found = run(command, *overrides)
        assert code == 2
        assert found.splitlines()[-1].startswith(
            f"dpo: error: {path} is of another run: "
        )
        assert said in found
    assert contents(Path("out")) == before


def test_every_difference_is_shown(run, caplog):
    path = leave_checkpoint()
    _, said = run(
        "validate", "trainer.beta=0.2", "trainer.seed=1", "trainer.log_steps=1"
    )
    assert "trainer.log_steps was 10 and is 1, which does no harm\n" in caplog.text
    assert f"{path} is of another run: trainer.seed was 42 and is 1\n" in caplog.text
    assert said.endswith(
        "was 0.1 and is 0.2 (and 1 more); a run goes on as it began:"
        " set it back, or give another save_directory\n"
    )


def test_a_run_that_is_over_or_too_short(run):
    constant = ["trainer.lr_scheduler_type=constant"]
    path = leave_checkpoint(6, *constant)
    for command in ("validate", "train"):
        code, said = run(command, *constant, "trainer.max_training_steps=5")
        assert code == 2 and f"{path} is beyond the 5 steps of this run" in said
        Store(Path("out"), None).mark_finished(6)
        code, said = run(command, *constant, "trainer.max_training_steps=6")
        assert code == 2 and "all 6 steps of the run in " in said


def test_a_full_folder_is_not_begun_anew(run):
    leave_checkpoint()
    for command in ("validate", "train"):
        code, said = run(command, "trainer.resume=false")
        assert code == 2
        assert "save_directory='out' has 'checkpoints', and resume=False begins" in said


def test_damage_that_needs_no_reading_is_seen(run, caplog):
    older, newest = leave_checkpoint(2), leave_checkpoint(4)
    (newest / "run.json").write_text("{}")
    code, said = run("validate")
    assert code == 0 and f"{newest}: run.json has 2 bytes" in caplog.text
    assert f"goes on     from {older}\n" in said
    (older / "manifest.json").unlink()
    for command in ("validate", "train"):
        code, said = run(command)
        assert code == 2 and "has no checkpoint that is whole" in said


def test_an_option_that_is_new_was_as_it_is_by_default(run, monkeypatch):
    old = configuration

    def without_seed(*given):
        return {k: x for k, x in old(*given).items() if k != "trainer.seed"}

    monkeypatch.setitem(globals(), "configuration", without_seed)
    leave_checkpoint()
    assert run("validate")[0] == 0
    code, said = run("validate", "trainer.seed=1")
    assert code == 2 and "trainer.seed was 42 and is 1; a run goes on" in said


def test_values_that_the_reference_is_to_give_are_not_compared(run):
    leave_checkpoint(2, "trainer.precompute_ref_log_probs=true")
    code, said = run("validate", "trainer.precompute_ref_log_probs=true")
    assert code == 0 and "goes on" in said
