"""Tiny runs to plan: a config.json and no weights."""

import json
from dataclasses import replace
from typing import Any

from engine.config.dpo import DPOConfig
from engine.config.run import (
    MixtureConfig,
    ModelConfig,
    RunConfig,
    ShardingConfig,
    SourceConfig,
)
from engine.planning.devices import devices_of
from engine.planning.models import model_configs
from engine.planning.steps import make_step
from engine.planning.targets import parse_target
from tests.engine.tiny_models import tiny_config

MODEL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


def tiny_run(
    folder, model=None, sharding=None, lora=None, remat: Any = "full", **trainer
):
    config = tiny_config("llama", **MODEL | (model or {}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.hf_config))
    options: dict[str, Any] = {"total_batch_size": 4, "max_length": 64}
    options["max_completion_length"] = 32
    return RunConfig(
        model=ModelConfig(name_or_path=str(folder), remat=remat),
        mixture=MixtureConfig(informs=(SourceConfig(data_files="none.jsonl"),)),
        sharding=sharding or ShardingConfig(),
        lora=lora,
        trainer=DPOConfig(save_directory=str(folder / "out"), **options | {**trainer}),
    )


def absent_devices(target, monkeypatch):
    """A target's, with the environment that its compiler needs."""
    found = parse_target(target)
    for name, value in found.environment.items():
        monkeypatch.setenv(name, value)
    return devices_of(found)


def tiny_step(run, target="cpu:1"):
    mesh = run.sharding.mesh(devices_of(parse_target(target)))
    return make_step(run, *model_configs(run), mesh)


def with_model(run, **changes):
    return replace(run, model=replace(run.model, **changes))
