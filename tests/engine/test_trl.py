"""AdamW steps from the same checkpoint and data give TRL's own metrics."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from engine import DPOConfig, DPOTrainer, load_model
from engine.parallel.sharding import make_mesh
from tests.json_lines import read_lines

FIXTURES = Path(__file__).parents[1] / "fixtures" / "trl"
# TRL's own runs differ by 1e-5 of this measure between kernels: see fixtures/README.md.
TOLERANCE = 2e-4


def train(
    case: Path, directory: Path, *, evaluate: bool = True, **changes
) -> list[dict]:
    import jax

    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    settings = json.loads((case / "settings.json").read_text()) | changes
    if not evaluate:
        del settings["eval_batch_size"]
    reference = None
    if (case / "reference").exists():
        reference = load_model(case / "reference", mesh=mesh, dtype="float32")
    DPOTrainer(
        model=load_model(case / "model", mesh=mesh, dtype="float32"),
        reference_model=reference,
        arguments=DPOConfig(**settings, save_directory=str(directory)),
        train_dataset=read_lines(case / "data.jsonl"),
        eval_dataset=read_lines(case / "eval.jsonl") if evaluate else None,
        processing_class=AutoTokenizer.from_pretrained(case / "model"),
    ).train()
    return read_lines(directory / "metrics.jsonl")


def worst(ours: list[dict], theirs: list[dict], but: tuple[str, ...] = ()):
    """The largest difference of any metric, relative to max(1, |TRL's|)."""
    assert len(ours) == len(theirs)
    return max(
        (abs(line[name] - value) / max(1, abs(value)), name, line["step"])
        for line, wanted in zip(ours, theirs, strict=True)
        for name, value in wanted.items()
        if name not in but
    )


@pytest.mark.parametrize(
    "name", ["text", pytest.param("chat", marks=pytest.mark.numerics)]
)
def test_the_metrics_are_those_of_trl(name, tmp_path):
    theirs = read_lines(FIXTURES / name / "metrics.jsonl")
    assert len(theirs) == 6  # five steps, one evaluation
    ours = train(FIXTURES / name, tmp_path)
    assert worst(ours, theirs)[0] < TOLERANCE, worst(ours, theirs)
    # The runs move: a trainer that stood still would be off by hundreds of tolerances.
    assert max(abs(line["rewards/margins"]) for line in ours[:-1]) > 0.05

    after = load_file(tmp_path / "model.safetensors")
    before = load_file(FIXTURES / name / "model" / "model.safetensors")
    norms = json.loads((FIXTURES / name / "final_norms.json").read_text())
    for tensor, (norm, change) in norms.items():
        moved = np.linalg.norm(after[tensor].ravel() - before[tensor].ravel())
        np.testing.assert_allclose(np.linalg.norm(after[tensor]), norm, rtol=TOLERANCE)
        np.testing.assert_allclose(moved, change, rtol=2e-3, err_msg=tensor)


def test_accumulation_gives_the_metrics_of_the_whole_batch(tmp_path):
    theirs = read_lines(FIXTURES / "chat" / "metrics.jsonl")
    ours = train(FIXTURES / "chat", tmp_path, gradient_accumulation_steps=2)
    # TRL, too, counts epochs in microbatches.
    assert worst(ours, theirs, but=("epoch",))[0] < TOLERANCE, worst(ours, theirs)


@pytest.mark.parametrize("name", ["sum", "divergence", "weighting"])
def test_losses_and_their_modifiers_are_trl_s(name, tmp_path):
    """Every loss of TRL is in one of the sums, with the weight that balances it."""
    case = json.loads((FIXTURES / "losses.json").read_text())[name]
    theirs, steps = case["metrics"], len(case["metrics"])
    ours = train(
        FIXTURES / "text",
        tmp_path,
        evaluate=False,
        max_training_steps=steps,
        **case["options"],
    )
    first = worst(ours[:1], theirs[:1])
    assert first[0] < 1e-5, first
    assert worst(ours, theirs)[0] < TOLERANCE, worst(ours, theirs)
