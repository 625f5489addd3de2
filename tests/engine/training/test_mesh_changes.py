"""A run that goes on with another mesh gives what one that was not cut off gives."""

import shutil

import numpy as np
import pytest

from engine import load_model
from tests.engine.training.runs import SHORT, make_trainer, one_device
from tests.json_lines import read_lines

pytestmark = pytest.mark.usefixtures("shared_programs")

SETTINGS = {
    "train_dataset": SHORT,
    "evaluate": False,
    "num_train_epochs": 2,
    "save_steps": 1,
    "save_total_limit": None,
}


def metrics(directory):
    return [
        {name: x for name, x in line.items() if "perf/" not in name}
        for line in read_lines(directory / "metrics.jsonl")
    ]


def weights(directory):
    model = load_model(directory, mesh=one_device(), dtype="float32")
    return {path: np.asarray(x[...]) for path, x in model.variables().items()}


def test_rows_and_parameters_over_others_than_before(tmp_path):
    """Parameters over two devices, then rows as well, then again parameters alone."""
    make_trainer(tmp_path / "whole", **SETTINGS, sizes=(1, 2, 1)).train()
    lines, trained = metrics(tmp_path / "whole"), weights(tmp_path / "whole")
    before = tmp_path / "whole"
    for name, step, sizes in (("rows", 3, (1, 1, 1, 2)), ("again", 5, (1, 2, 1))):
        cut = tmp_path / name
        for number in range(1, step + 1):
            saved = f"checkpoints/step-{number:08d}"
            shutil.copytree(before / saved, cut / saved)
        shutil.copy(before / "metrics.jsonl", cut)
        trainer = make_trainer(cut, **SETTINGS, sizes=sizes)
        trainer.train()
        assert len(lines) == len(metrics(cut)) == 3
        for got, want in zip(metrics(cut), lines, strict=True):
            assert got == pytest.approx(want, rel=1e-4, abs=1e-5)
        for path, got in weights(cut).items():
            # Of six steps of 1e-3 at most, the first of which divides g by |g|.
            np.testing.assert_allclose(got, trained[path], atol=2e-4)
        before = cut
