"""The first step's check of references that are named, precomputed, or other models."""

import logging
import math
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from engine import LoraConfig, load_model
from engine.errors import InputError
from engine.training.start_check import ReferenceCheck
from tests.engine.training.runs import FIXTURE, SHORT, make_trainer, one_device
from tests.engine.training.test_checkpoints import weights
from tests.engine.training.test_nonfinite import BAD
from tests.engine.training.test_start_check import first_step
from tests.json_lines import read_lines

pytestmark = pytest.mark.usefixtures("shared_programs")

ONE: dict[str, Any] = {
    "train_dataset": SHORT,
    "evaluate": False,
    "max_training_steps": 1,
    "log_steps": 1,
}
PASSED, OTHER = "start check passed", "start check: nats a token of policy and ref"


def scaled(by: float, dtype: str = "float32") -> Any:
    model = load_model(FIXTURE / "model", mesh=one_device(), dtype=dtype)
    nnx.update(model, jax.tree.map(lambda x: x * by, nnx.state(model)))
    return model


@pytest.mark.parametrize(
    ("settings", "heard"),
    [
        # The policy's own checkpoint, by its name; and where it computes otherwise.
        ({"reference_model": FIXTURE / "model", "offload_ref_model": True}, PASSED),
        ({"reference_model": (1.0, "bfloat16")}, OTHER),
        ({"precompute_ref_log_probs": True}, PASSED),
        ({"lora": LoraConfig(r=2), "reference_model": (1.01, "float32")}, OTHER),
    ],
    ids=["named", "named_dtype", "precomputed", "lora_other"],
)
def test_which_check_is_made(tmp_path, caplog, settings, heard):
    if isinstance(given := settings.get("reference_model"), tuple):
        settings = settings | {"reference_model": scaled(*given)}
    with caplog.at_level(logging.INFO, logger="engine"):
        make_trainer(tmp_path, **ONE | settings).train()
    (said,) = (x for x in caplog.messages if x.startswith("start check"))
    assert said.startswith(heard)
    assert "worse than an even guess" not in caplog.text


def test_the_numbers_are_those_of_the_reference(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="engine"):
        make_trainer(tmp_path, **ONE, reference_model=scaled(1.01)).train()
    # The same as a policy, and what it is measured from then.
    make_trainer(tmp_path / "other", **ONE, model=scaled(1.01)).train()
    lines = [read_lines(x / "metrics.jsonl")[0] for x in (tmp_path, tmp_path / "other")]
    mine, its = (line["logps/chosen"] for line in lines)
    tokens = (mine - its) / lines[0]["log_ratio/chosen"]  # of a pair
    said = f"chosen {-mine / tokens:.3g} and {-its / tokens:.3g}, rejected "
    assert OTHER in caplog.text and said in caplog.text


def test_a_reference_that_guesses_is_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="engine"):
        make_trainer(tmp_path, **ONE, reference_model=scaled(8.0)).train()
    said = [x for x in caplog.messages if "worse than an even guess" in x]
    assert [x.split(" answers")[0] for x in said] == [
        "step 1: the reference gives the chosen",
        "step 1: the reference gives the rejected",
    ]


# Of `first_step`: 100 nats and 40 tokens a side.
BOUND = 4 * 2.0**-23 * 260


def test_log_probabilities_above_0_are_refused(caplog):
    check = ReferenceCheck(1000, "float32")
    check(first_step(0.5, chosen=-100 - BOUND * 0.9, rejected=100.0))
    assert "the rejected answers 5 nats" not in caplog.text  # ln 1000 is 6.9
    with pytest.raises(InputError, match="step 1: the reference's log-prob.* chosen "):
        check(first_step(0.5, chosen=-100 - BOUND * 1.2))
    with pytest.raises(InputError, match="of the rejected sum up to 1 over the batch"):
        check(first_step(0.5, rejected=-101.0))


@pytest.mark.parametrize(("vocab", "warned"), [(math.e**4.9, True), (math.e**5.1, 0)])
def test_what_an_even_guess_is(caplog, vocab, warned):
    ReferenceCheck(round(vocab), "float32")(first_step(0.5, chosen=100.0))
    assert ("the chosen answers 5 nats a token, worse" in caplog.text) == warned


# One program for all of them: its second step has rows that cannot be added up.
SEVERAL: dict[str, Any] = {
    "train_dataset": BAD,
    "shuffle_train_dataset": False,
    "num_train_epochs": 1,
    "lr_scheduler_type": "constant",
    "evaluate": False,
    "log_steps": 1,
    "on_nonfinite": "skip",
    "reference_model": FIXTURE / "model",
    "dtype": "bfloat16",
    "sizes": (2, 2, 1),
}


def test_several_devices_check_and_leave_a_step_out(tmp_path, caplog):
    one, two = (
        make_trainer(tmp_path / str(n), **SEVERAL, max_training_steps=n) for n in (1, 2)
    )
    with caplog.at_level(logging.INFO, logger="engine"):
        one.train()
        two.train()
    assert [x.startswith(PASSED) for x in caplog.messages].count(True) == 2
    assert weights(one) == weights(two)
    moments = [jax.tree.leaves(jax.device_get(x.state.opt_state)) for x in (one, two)]
    assert all(np.array_equal(a, b) for a, b in zip(*moments, strict=True))
    lines = read_lines(tmp_path / "2" / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [0, 1]
    assert lines[0]["loss"] is not None and lines[1]["loss"] is None
    assert "rows 4, 5, 6, 7, from 0); this update is left out" in caplog.text


def test_several_devices_find_another_reference(tmp_path):
    trainer = make_trainer(tmp_path, **SEVERAL)
    reference: Any = trainer._reference
    # bfloat16 explains a lot of so short a sum.
    reference.operands = jax.tree.map(lambda x: x * 1.5, reference.operands)
    with pytest.raises(InputError, match="step 1: log_ratio/chosen is not 0, though"):
        trainer.train()
