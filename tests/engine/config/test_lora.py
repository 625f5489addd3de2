"""The options of LoRA: what is refused, and what they describe."""

import pytest

from engine import DPOConfig, LoraConfig
from engine.config.lora import check_dropout
from engine.config.run import RunConfig
from engine.config.run_file import RunFile, build
from engine.errors import InputError
from engine.models.adapter import LINEARS

NAMES = ", ".join(LINEARS)


def test_the_defaults_are_pefts():
    adapter = LoraConfig().new_adapter("org/base")
    assert (adapter.rank, adapter.alpha, adapter.dropout) == (8, 8.0, 0.0)
    assert adapter.modules == ("q_proj", "v_proj")
    assert adapter.scale == 1.0 and adapter.base == "org/base"


def test_scales_and_modules():
    plain = LoraConfig(r=4, lora_alpha=6, target_modules=("v_proj", "q_proj"))
    assert plain.new_adapter(None).scale == 1.5
    assert plain.new_adapter(None).modules == ("q_proj", "v_proj")  # the layer's order
    rslora = LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear")
    assert rslora.new_adapter(None).scale == 3.0
    assert rslora.new_adapter(None).modules == tuple(LINEARS)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"r": 0}, "r=0 must be greater than 0"),
        ({"r": 2.5}, "r=2.5 must be a whole number"),
        ({"lora_alpha": 0}, "lora_alpha=0.0 must be greater than 0"),
        ({"lora_alpha": "x"}, "lora_alpha='x' must be a finite number"),
        ({"lora_dropout": 1}, "lora_dropout=1.0 must be at least 0 and below 1"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1 must be at least 0 and below 1"),
        ({"use_rslora": 1}, "use_rslora=1 must be true or false"),
        ({"target_modules": []}, "target_modules=[] names no module; allowed: all-"),
        (
            {"target_modules": "q_proj"},
            "target_modules='q_proj' must be one of all-linear or a list",
        ),
        (
            {"target_modules": ["qproj"]},
            "'qproj', which is no linear module of thes",
        ),
        ({"target_modules": ["qproj"]}, "did you mean 'q_proj'?; allowed: all-linear"),
        ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head', which can have no"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens', which can have no"),
        ({"target_modules": ["q_proj", "q_proj"]}, "has 'q_proj' twice"),
        ({"adapter": ""}, "adapter='' must not be empty"),
        (
            {"adapter": "a", "r": 4},
            "r=4 has no effect as adapter='a' has its own; remove it",
        ),
        ({"adapter": "a", "use_rslora": True}, "use_rslora=True has no effect as a"),
        ({"rank": 4}, "rank: no such option"),
        ({"use_dora": True}, "use_dora: no such option"),
    ],
)
def test_bad_option(options, expected):
    with pytest.raises(InputError) as caught:
        LoraConfig(**options)
    assert expected in str(caught.value)


def run_of(**sections):
    tree = {
        "model": {"name_or_path": "m"},
        "mixture": {"informs": [{"data_files": "a.csv"}]},
    } | sections
    run_file = RunFile(path="run.yaml", tree=tree, overridden=frozenset())
    return build(RunConfig, run_file)


@pytest.mark.parametrize(
    "sections, expected",
    [
        (
            {"lora": {"lora_dropout": 0.1}},
            "lora.lora_dropout=0.1 has no effect with trainer.disable_dropout=True, "
            "the default; set disable_dropout to false, or lora_dropout to 0",
        ),
        (
            {"trainer": {"disable_dropout": False}},
            "trainer.disable_dropout=False cannot be had: the models have no dropout",
        ),
        (
            {"trainer": {"disable_dropout": False}, "lora": {}},
            "trainer.disable_dropout=False has no effect with lora.lora_dropout=0",
        ),
        (
            {"trainer": {"sync_ref_model": True}, "lora": {}},
            "trainer.sync_ref_model=True cannot be had with LoRA",
        ),
        (
            {"reference_model": {"adapter": "a"}},
            "reference_model.name_or_path is missing; only with lora",
        ),
        ({"reference_model": {}}, "reference_model.name_or_path is missing"),
        (
            {"lora": {"target_modules": ["w1"]}},
            f"lora.target_modules has 'w1', which is no linear module of these models; "
            f"allowed: all-linear, or a list of {NAMES}",
        ),
        ({"lora": {"rnk": 1}}, "unknown key lora.rnk"),
    ],
)
def test_bad_combination(sections, expected):
    with pytest.raises(InputError) as caught:
        run_of(**sections)
    assert str(caught.value).startswith(f"run.yaml: {expected}")


def test_good_combinations():
    assert run_of().lora is None
    assert run_of(lora={}).lora == LoraConfig()
    run = run_of(
        lora={"lora_dropout": 0.1, "target_modules": "all-linear"},
        trainer={"disable_dropout": False},
        reference_model={"adapter": "a"},
    )
    assert run.reference_model is not None and run.reference_model.name_or_path is None
    check_dropout(DPOConfig(disable_dropout=False), 0.1)
