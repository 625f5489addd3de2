"""Options of training: types, ranges, and combinations that mean nothing."""

import dataclasses

import numpy as np
import pytest

from engine.config.dpo import DPOConfig
from engine.config.fields import check_types
from engine.config.run import ShardingConfig
from engine.errors import InputError


def test_tutorial_options_in_python():
    config = DPOConfig(
        model_name="DPOTrainer",
        learning_rate=1e-6,
        beta=0.1,
        loss_type="sigmoid",
        label_smoothing=0.0,
        max_length=512,
        max_prompt_length=256,
        max_completion_length=256,
        reference_free=False,
        sync_ref_model=False,
        ref_model_sync_steps=64,
        disable_dropout=True,
        total_batch_size=16,
        gradient_accumulation_steps=1,
    )
    assert config.max_completion_length == 256
    DPOConfig(loss_type="ipo", beta=0.2)
    DPOConfig(sync_ref_model=True, ref_model_sync_steps=128, ref_model_mixup_alpha=0.9)
    DPOConfig(reference_free=True)


def test_config_is_a_static_argument():
    assert hash(DPOConfig(beta=1)) == hash(DPOConfig(beta=1.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        DPOConfig().beta = 0.2  # pyright: ignore[reportAttributeAccessIssue]


def test_batch_sizes():
    config = DPOConfig(total_batch_size=12, gradient_accumulation_steps=3)
    assert (config.microbatch_size, config.pairs_per_eval_batch) == (4, 4)
    assert DPOConfig(eval_batch_size=5).pairs_per_eval_batch == 5


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            {"loss_type": "sigmiod"},
            "loss_type='sigmiod' must be one of sigmoid, hinge, ipo, exo_pair",
        ),
        ({"save_directory": ""}, "save_directory='' must not be empty"),
        ({"beta": 0}, "beta=0.0 must be greater than 0"),
        ({"max_length": 1}, "max_length=1 must be at least 2"),
        ({"learning_rate": -1e-6}, "learning_rate=-1e-06 must be at least 0"),
        ({"max_grad_norm": -1}, "max_grad_norm=-1.0 must be at least 0"),
        ({"adam_beta2": 1}, "adam_beta2=1.0 must be at least 0 and below 1"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5 must be at least 0 and below"),
        ({"log_steps": 0}, "log_steps=0 must be greater than 0"),
        (
            {"total_batch_size": 6, "gradient_accumulation_steps": 4},
            "total_batch_size=6 must be a multiple of gradient_accumulation_steps=4",
        ),
        (
            {"loss_type": "ipo", "label_smoothing": 0.1},
            "label_smoothing=0.1 has no effect with loss_type 'ipo'",
        ),
        (
            {"reference_free": True, "sync_ref_model": True},
            "sync_ref_model=True has no effect with reference_free",
        ),
        (
            {"ref_model_sync_steps": 10},
            "ref_model_sync_steps=10 has no effect without sync_ref_model",
        ),
        (
            {"sync_ref_model": True, "ref_model_mixup_alpha": 0},
            "ref_model_mixup_alpha=0.0 must be above 0",
        ),
        (
            {"max_length": 1000000000000000019884624838656},
            "max_length=1000000000000000019884624838656 is too large",
        ),
        ({"total_batch_size": 2**31}, "=2147483648 must be at least 1 and below 21474"),
        ({"eval_steps": 10**5000}, "eval_steps=<a int too large to print> is too "),
        ({"warmup_steps": 2**63}, "warmup_steps=9223372036854775808 is too large"),
        ({"beta": 10**400}, "... is too large"),
        ({"beta": 1e300}, "beta=1e+300 is infinite in float32"),
        ({"adam_epsilon": 1e-40}, "adam_epsilon=1e-40 is 0 in float32, in which"),
        ({"adam_beta1": 0.99999999}, "adam_beta1=0.99999999 is 1 in float32"),
        ({"adam_beta2": 1 - 2**-26}, "is 1 in float32, in which the moments"),
    ],
)
def test_bad_option(options, expected):
    with pytest.raises(InputError) as caught:
        DPOConfig(**options)
    assert expected in str(caught.value)


def test_wandb_must_be_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install wandb"):
        DPOConfig(use_wandb=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert DPOConfig(use_wandb=True).use_wandb


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """Stands for every section: the hook on `engine` would refuse wrong types first."""

    number: float = 0.0
    whole: int | None = None
    names: str | tuple[str, ...] = ()
    part: ShardingConfig = ShardingConfig()

    def __post_init__(self):
        check_types(self)


@pytest.mark.parametrize(
    "field, given, kept",
    [
        ("number", 1, 1.0),
        ("number", "1e-6", 1e-6),
        ("number", np.float32(0.5), 0.5),
        ("whole", np.int64(3), 3),
        ("whole", None, None),
        ("names", "one", "one"),
        ("names", ["one", "two"], ("one", "two")),
    ],
)
def test_values_become_the_declared_type(field, given, kept):
    value = getattr(Checked(**{field: given}), field)
    assert value == kept and type(value) is type(kept)


@pytest.mark.parametrize(
    "field, given, expected",
    [
        ("number", None, "number=None must be a finite number"),
        ("number", True, "number=True must be a finite number"),
        ("number", "one", "number='one' must be a finite number"),
        ("number", "010", "number='010' must be a finite number"),
        ("whole", 1.0, "whole=1.0 must be a whole number or null"),
        ("whole", "1", "whole='1' must be a whole number or null"),
        ("names", 1, "names=1 must be a string or a list, each entry a string"),
        ("names", [1], "names.0=1 must be a string"),
        ("part", {"data": 1}, "part={'data': 1} must be a ShardingConfig"),
    ],
)
def test_values_of_another_type_are_refused(field, given, expected):
    with pytest.raises(InputError) as caught:
        Checked(**{field: given})
    assert str(caught.value) == expected
