"""LoRA runs of TRL with PEFT, from the same adapter, model and data."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from engine import DPOConfig, DPOTrainer, LoraConfig, load_model
from engine.models import load_adapter
from engine.models.generate import full_logits
from engine.parallel.sharding import make_mesh
from tests.engine.test_trl import TOLERANCE, worst
from tests.json_lines import read_lines

FIXTURES = Path(__file__).parents[1] / "fixtures"
FIRST = 1e-5  # of the first step, which no update has passed through


def on_mesh(*sizes):
    return make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])


def base_of(case: Path, mesh):
    source = FIXTURES / "trl" / json.loads((case / "settings.json").read_text())["case"]
    return source, load_model(source / "model", mesh=mesh, dtype="float32")


@pytest.mark.parametrize(
    ("name", "sizes", "changes"),
    [
        ("new", (1, 1, 1), {}),
        ("trained", (2, 1, 2), {"gradient_accumulation_steps": 2}),
    ],
)
def test_the_metrics_are_those_of_trl(name, sizes, changes, tmp_path):
    case = FIXTURES / "trl_lora" / name
    source, model = base_of(case, on_mesh(*sizes))
    settings = json.loads((case / "settings.json").read_text())["settings"] | changes
    DPOTrainer(
        model=model,
        arguments=DPOConfig(**settings, save_directory=str(tmp_path)),
        train_dataset=read_lines(source / "data.jsonl"),
        eval_dataset=read_lines(source / "eval.jsonl"),
        processing_class=AutoTokenizer.from_pretrained(source / "model"),
        lora=LoraConfig(adapter=str(case / "adapter")),
    ).train()
    ours = read_lines(tmp_path / "metrics.jsonl")
    theirs = read_lines(case / "metrics.jsonl")
    assert worst(ours, theirs, but=("epoch",))[0] < TOLERANCE, worst(ours, theirs)
    for metric, value in theirs[0].items():
        if metric != "epoch":
            assert abs(ours[0][metric] - value) < FIRST * max(1, abs(value)), metric
    # The runs move: a trainer that stood still would be off by hundreds of tolerances.
    assert max(abs(line["rewards/margins"]) for line in ours[:-1]) > 0.05

    after = load_file(tmp_path / "adapter_model.safetensors")
    before = load_file(case / "adapter" / "adapter_model.safetensors")
    norms = json.loads((case / "final_norms.json").read_text())
    assert set(after) == set(norms)
    for tensor, (norm, change) in norms.items():
        moved = np.linalg.norm(after[tensor].ravel() - before[tensor].ravel())
        np.testing.assert_allclose(np.linalg.norm(after[tensor]), norm, rtol=TOLERANCE)
        np.testing.assert_allclose(moved, change, rtol=2e-3, err_msg=tensor)


def test_the_logits_are_those_of_peft():
    case = FIXTURES / "trl_lora" / "trained"
    recorded = json.loads((case / "logits.json").read_text())
    _, model = base_of(case, on_mesh(1, 2, 2))
    model = load_adapter(model, case / "trained")
    ours = full_logits(model, jnp.asarray(recorded["tokens"], jnp.int32))[:, -1]
    theirs = np.array(recorded["last_logits"])
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()
