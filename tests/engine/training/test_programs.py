"""Which step a run has where the devices' memory decides."""

import pytest

from engine import load_model
from engine.training import programs
from engine.training.compilation import Compiled, TooLittleMemory, compile_all
from engine.training.memory import Taken
from tests.engine.training.runs import FIXTURE, make_trainer, one_device

CHOSEN = "model.remat=auto is "


@pytest.fixture
def trainer(tmp_path):
    model = load_model(
        FIXTURE / "model", mesh=one_device(), dtype="float32", remat="auto"
    )
    return make_trainer(tmp_path, evaluate=False, model=model)


class Step(Compiled):
    """What a compiler says of a step: the more it keeps, the more it takes."""

    def __init__(self, request):
        super().__init__({})
        text = str(request.step.trace(*next(iter(request.arguments.values()))).jaxpr)
        # By its policy; the reference's, which has no backward pass, keeps nothing.
        policies = {
            "_save_activations": 300,
            "save_from_both_policies": 200,
            "SaveAndOffloadOnlyTheseNames": 50,
        }
        self.peak = next((x for name, x in policies.items() if name in text), 100)

    def taken(self, platform):
        return Taken(0, self.peak)


@pytest.mark.parametrize(
    ("limit", "chosen"),
    [(316, "none"), (315, "dots"), (211, "dots"), (210, "full"), (1, "offload")],
)
def test_auto_recomputes_no_more_than_memory_demands(
    trainer, monkeypatch, caplog, limit, chosen
):
    """Of each device a twentieth is left free: 300 of 316, and not of 315."""
    monkeypatch.setattr(programs, "limit_bytes", lambda mesh: limit)
    monkeypatch.setattr(
        programs, "compile_all", lambda requests: [Step(x) for x in requests]
    )
    caplog.set_level("INFO", "engine")
    trainer._programs.compile(training=True)
    assert f"{CHOSEN}{chosen}" in caplog.text
    keeps = {"none": 300, "dots": 200, "full": 100, "offload": 50}
    assert trainer._programs._train.peak == keeps[chosen]


def test_what_the_compiler_refuses_does_not_fit(trainer, monkeypatch, caplog):
    refused = []

    def compile_but_first(requests):
        if not refused:
            refused.append(True)
            raise TooLittleMemory("RESOURCE_EXHAUSTED")
        return compile_all(requests)

    monkeypatch.setattr(programs, "limit_bytes", lambda mesh: 2**40)
    monkeypatch.setattr(programs, "compile_all", compile_but_first)
    caplog.set_level("INFO", "engine")
    trainer.train()
    assert "auto: none does not fit" in caplog.text
    assert f"{CHOSEN}dots" in caplog.text


def test_devices_that_do_not_say_what_they_have_recompute_all(trainer, caplog):
    caplog.set_level("INFO", "engine")
    trainer._programs.compile(training=True)
    assert f"{CHOSEN}full" in caplog.text
