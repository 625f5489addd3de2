"""`run.json`: whole, complete, and nobody else's."""

import json

import pytest

from engine.config.dpo import DPOConfig
from engine.errors import InputError
from engine.training.records import RunRecord


def record(folder, rate=1e-6):
    config = {"trainer": DPOConfig(learning_rate=rate, loss_type=("sigmoid", "sft"))}
    return RunRecord(folder, config, {"steps": "3"})


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_option_is_written_before_the_first_step(tmp_path):
    record(tmp_path / "new").started(3, 0)
    found = read(tmp_path / "new" / "run.json")
    assert found["facts"] == {"steps": "3"} and found["from_step"] == 0
    trainer = found["config"]["trainer"]
    assert trainer["loss_type"] == ["sigmoid", "sft"] and trainer["seed"] == 42
    again = DPOConfig(**trainer)
    assert again == DPOConfig(loss_type=("sigmoid", "sft"))
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["run.json"]


def test_an_earlier_run_s_is_kept_and_a_run_that_goes_on_writes_over_its_own(tmp_path):
    record(tmp_path, 1e-3).started(3, 0)
    record(tmp_path, 1e-4).started(3, 0)
    record(tmp_path, 1e-5).started(3, 2)
    rates = {
        path.name: read(path)["config"]["trainer"]["learning_rate"]
        for path in tmp_path.iterdir()
    }
    assert rates == {"run.json": 1e-5, "run.1.json": 1e-3}


@pytest.mark.parametrize("text", ["{}", "not json", "[1]", '{"writer": "me"}'])
def test_another_s_file_is_left_alone(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"run\.json was not written by an earlier"):
        record(tmp_path).started(3, 0)
    assert path.read_text() == text
