"""Models of shapes are those that training loads: same arrays, same sharing."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from engine.commands.train import load_models
from engine.config.lora import LoraConfig
from engine.config.run import ReferenceConfig
from engine.errors import InputError
from engine.models import save_pretrained
from engine.parallel.sharding import make_mesh
from engine.planning.models import (
    abstract_models,
    model_config,
    model_configs,
    with_local_models,
)
from engine.planning.steps import with_options
from engine.training.reference import make_reference
from tests.engine.planning.runs import tiny_run, with_model

DEMO = Path(__file__).parents[3] / "examples" / "demo" / "model"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A PEFT adapter of the demo's model."""
    folder = tmp_path_factory.mktemp("adapter")
    run = with_model(tiny_run(folder / "run"), name_or_path=str(DEMO))
    run = replace(run, lora=LoraConfig(r=3))
    policy, _ = load_models(run, model_configs(run)[0], mesh())
    save_pretrained(policy, folder / "saved")
    return str(folder / "saved")


def mesh():
    return make_mesh(1, 2, 1, jax.devices()[:2])


def kinds(tree):
    return [
        (jax.tree_util.keystr(path), x.shape, x.dtype, x.sharding)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]


def same(run):
    """That policy and reference's operands are alike; the reference."""
    config, _ = model_configs(run)
    shapes, weights = (f(run, config, mesh()) for f in (abstract_models, load_models))
    planned, loaded = (make_reference(*x, run.trainer) for x in (shapes, weights))
    assert type(planned) is type(loaded)
    assert kinds(planned.operands) == kinds(loaded.operands)
    for one, other in zip(shapes, weights, strict=True):
        assert (one is None) == (other is None)
    policies = [
        {path: x.get_value() for path, x in model.variables().items()}
        for model in (shapes[0], weights[0])
    ]
    assert kinds(policies[0]) == kinds(policies[1])
    assert shapes[0].dtype == weights[0].dtype
    return planned


def test_models_are_those_that_training_loads(tmp_path, adapter):
    run = with_model(tiny_run(tmp_path), name_or_path=str(DEMO))
    lora = replace(run, lora=LoraConfig(r=4, target_modules="all-linear"))
    named = ReferenceConfig(name_or_path=str(DEMO))
    for one in (
        run,
        with_model(run, dtype="float32", param_dtype="bfloat16"),
        with_options(run, sync_ref_model=True),
        replace(run, reference_model=replace(named, dtype="float32")),
        lora,
        replace(lora, reference_model=named),
        replace(lora, reference_model=replace(named, dtype="float32")),
        replace(run, lora=LoraConfig(adapter=adapter)),
        replace(lora, reference_model=ReferenceConfig(adapter=adapter)),
    ):
        same(one)


def test_without_weights_a_model_is_what_its_config_says(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    found = model_config(tmp_path)
    assert found == model_config(DEMO)
    assert found.origin is not None and found.origin.directory == tmp_path
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="empty; fetch it again"):
        model_config(tmp_path)


def test_of_a_hub_id_no_weight_is_downloaded(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append((name, "*.safetensors" in ignore_patterns))
        assert "*.json" in allow_patterns
        return str(DEMO)

    monkeypatch.setattr("engine.models.checkpoint.snapshot_download", download)
    run = with_model(tiny_run(tmp_path), name_or_path="some/model")
    run = replace(run, reference_model=ReferenceConfig(name_or_path="other/model"))
    local = with_local_models(run)
    assert asked == [("other/model", True), ("some/model", True)]
    assert local.model.name_or_path == local.model.tokenizer == str(DEMO)
    assert local.reference_model and local.reference_model.name_or_path == str(DEMO)
