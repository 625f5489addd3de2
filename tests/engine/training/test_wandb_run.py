"""Weights & Biases, with a stand-in for the package, which the tests do not need."""

import importlib.machinery
import json
import logging
import sys
import types
from typing import Any

import pytest

from engine.config.dpo import DPOConfig
from engine.config.run import MixtureConfig, ModelConfig, RunConfig, SourceConfig
from engine.config.show import plain
from engine.errors import InputError
from engine.training.events import Generation, Record
from engine.training.listeners import own_listeners
from engine.training.wandb_run import WandB


class Service:
    """What `wandb` was asked for: runs by their ids, each a list of what was logged."""

    def __init__(self):
        self.inits: list[dict[str, Any]] = []
        self.runs: dict[str, list[Any]] = {}
        self.broken = False

    def init(self, **options: Any) -> types.SimpleNamespace:
        if self.broken:
            raise ConnectionError("no route")
        self.inits.append(options)
        name = options.get("id", f"run{len(self.inits)}")
        logged = self.runs.setdefault(name, [])

        def log(values: dict[str, Any], step: int) -> None:
            if self.broken:
                raise ConnectionError("no route")
            logged.append((step, values))

        return types.SimpleNamespace(
            id=name, log=log, finish=lambda exit_code: logged.append(exit_code)
        )


@pytest.fixture
def service(monkeypatch):
    found = Service()
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    vars(module).update(init=found.init, Table=lambda columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return found


def wandb_of(directory, **options: Any) -> WandB:
    arguments = DPOConfig(save_directory=str(directory), use_wandb=True, **options)
    run = RunConfig(
        model=ModelConfig(name_or_path="m"),
        mixture=MixtureConfig(informs=(SourceConfig(data_files="x.jsonl"),)),
        trainer=arguments,
    )
    listeners = own_listeners(arguments, plain(run))
    (found,) = (x for x in listeners if isinstance(x, WandB))
    return found


def line(step: int) -> Record:
    return Record(kind="train", prefix="", step=step, metrics={"step": step, "loss": 1})


def test_the_whole_configuration_is_there(service, tmp_path):
    listener = wandb_of(tmp_path / "new", model_name="mine", beta=0.25)
    listener.started(4, 0)
    (init,) = service.inits
    assert (init["name"], init["dir"]) == ("mine", str(tmp_path / "new"))
    assert init["config"]["trainer"]["beta"] == 0.25
    assert init["config"]["model"]["name_or_path"] == "m"
    assert init["config"]["mixture"]["informs"][0]["data_files"] == "x.jsonl"
    json.dumps(init["config"])  # nothing but what JSON has


def test_a_run_that_goes_on_is_the_same_one(service, tmp_path):
    for done, steps in ((0, (1, 2)), (1, (2, 3))):
        listener = wandb_of(tmp_path)
        listener.started(4, done)
        for step in steps:
            listener.recorded(line(step))
        listener.ended(None)
    assert list(service.runs) == ["run1"]
    assert [x if isinstance(x, int) else x[0] for x in service.runs["run1"]] == [
        *(1, 2, 0),
        *(2, 3, 0),
    ]
    assert service.inits[1]["id"] == "run1" and service.inits[1]["resume"] == "allow"
    wandb_of(tmp_path).started(4, 0)  # anew: another one
    assert list(service.runs) == ["run1", "run3"]
    wandb_of(tmp_path).started(4, 2)
    assert service.inits[-1]["id"] == "run3"


def test_one_that_had_no_run_begins_one(service, tmp_path):
    wandb_of(tmp_path).started(4, 2)
    assert "id" not in service.inits[0]
    (tmp_path / "wandb_run.json").write_text("{")
    with pytest.raises(InputError, match=r"wandb_run.json cannot be read.* remove it"):
        wandb_of(tmp_path).started(4, 2)


def test_answers_are_a_table(service, tmp_path):
    listener = wandb_of(tmp_path)
    listener.started(4, 0)
    one = Generation(prompt="p", text="t", reference=None, set_name="far")
    listener.generated(2, [one])
    ((step, values),) = service.runs["run1"]
    columns, rows = values["generations"]
    assert step == 2 and columns == ["step", "set", "prompt", "policy", "reference"]
    assert rows == [[2, "far", "p", "t", None]]


def test_a_service_that_goes_away_is_one_warning(service, tmp_path, caplog):
    listener = wandb_of(tmp_path)
    listener.started(4, 0)
    service.broken = True
    with caplog.at_level(logging.WARNING, "engine"):
        listener.recorded(line(1))
        listener.generated(1, [Generation(prompt="p", text="t", reference=None)])
        listener.recorded(line(2))
    (said,) = caplog.messages
    assert "takes no more metrics" in said and said.endswith("training goes on")
    with pytest.raises(InputError, match="cannot begin a run.* set use_wandb to fal"):
        wandb_of(tmp_path).started(4, 0)
