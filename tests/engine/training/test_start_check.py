"""The first step's check of itself."""

import logging
import math
import re
from typing import Any

import jax
import numpy as np
import pytest

from engine import DPOConfig, LoraConfig
from engine.errors import InputError
from engine.objective.losses import LOSSES
from engine.training.metrics import Sums
from engine.training.start_check import StartCheck
from engine.training.step import StepOut
from tests.engine.training.runs import make_trainer

pytestmark = pytest.mark.usefixtures("shared_programs")


def first_step(loss: float, chosen: float = 0.0, rejected: float = 0.0) -> StepOut:
    """Of 4 pairs, 40 tokens a side and 100 nats; `loss` is a pair's, the rest a sum."""
    sums = {
        "pairs": {"loss": 4 * loss, "logps/chosen": -100.0, "logps/rejected": -100.0},
        "chosen": {"log_ratio/chosen": chosen},
        "rejected": {"log_ratio/rejected": rejected},
    }
    weights = {"pairs": 4.0, "chosen": 40.0, "rejected": 40.0}
    scalars: Any = (np.float32(1), np.float32(1), np.bool_(True), np.bool_(True))
    return StepOut(Sums(sums, weights), *scalars)  # pyright: ignore[reportArgumentType]


# 4 roundings of float32 of 100 nats and of 4 for each of 40 tokens.
BOUND = 4 * 2.0**-23 * 260


def test_what_rounding_explains_passes(caplog):
    check = StartCheck(DPOConfig(), "float32")
    with caplog.at_level(logging.INFO, logger="engine"):
        check(first_step(math.log(2)))
        check(first_step(math.log(2), BOUND * 0.99, -BOUND * 0.99))
    assert "start check passed" in caplog.text and "loss is 0.693147" in caplog.text


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_rounding_does_not_explain_is_refused(side, sign):
    check = StartCheck(DPOConfig(), "float32")
    with pytest.raises(InputError, match=f"step 1: log_ratio/{side} is not 0, though"):
        check(first_step(math.log(2), **{side: sign * BOUND * 1.01}))


@pytest.mark.parametrize("times", [6, 1.84, 1.0001, 0.5])
def test_another_loss_is_refused(times):
    said = f"step 1: the loss is {times * math.log(2):.6g}, and 0.693147 where"
    with pytest.raises(InputError, match=re.escape(said)):
        StartCheck(DPOConfig(), "float32")(first_step(times * math.log(2)))


KNOWN = {  # formulas of docs/losses.md at c = r = 0
    "sigmoid": math.log(2),
    "hinge": 1.0,
    "ipo": 25.0,  # (1 / (2 beta))^2
    "sigmoid_norm": math.log(2),
    "aot": math.log(2),
    "apo_zero": 1.0,
}


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].reference])
def test_each_losses_own_value(name):
    settings: dict[str, Any] = {"loss_type": name}
    if name == "exo_pair":
        settings["label_smoothing"] = 1e-3
    check = StartCheck(DPOConfig(**settings), "float32")
    value = float(np.asarray(check._values(np.float32(0)))[0])
    if name in KNOWN:
        assert value == pytest.approx(KNOWN[name], rel=1e-6)
    check(first_step(value))
    if name != "sft":  # which has no value of its own
        with pytest.raises(InputError, match="step 1: the loss is"):
            check(first_step(value + 1e-3))


def test_a_reference_that_is_another_is_found(tmp_path):
    trainer = make_trainer(tmp_path, evaluate=False, max_training_steps=2)
    reference: Any = trainer._reference
    reference.operands = jax.tree.map(lambda x: x * 1.001, reference.operands)
    with pytest.raises(InputError, match="step 1: log_ratio/chosen is not 0, though"):
        trainer.train()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("settings", [{"lora": LoraConfig(r=2)}, {"dtype": "bfloat16"}])
def test_where_it_is_made(tmp_path, caplog, settings):
    options: dict[str, Any] = {"evaluate": False, "max_training_steps": 1} | settings
    with caplog.at_level(logging.INFO, logger="engine"):
        make_trainer(tmp_path, **options).train()
    assert "start check passed" in caplog.text
