"""Checkpoint directories for tests: the fixtures, and copies that are changed."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from engine.models import load_model
from tests.engine.tiny_models import one_device

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
FAMILIES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())


def load(directory, mesh=None, **options):
    return load_model(directory, mesh=mesh or one_device(), **options)


def checkpoint(tmp_path, family="llama", change=None, **config):
    """A copy of a fixture, with other config keys and tensors."""
    target = tmp_path / "checkpoint"
    shutil.copytree(FIXTURES / family, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if change is not None:
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def names_in(directory):
    """Every file below a directory."""
    return {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file()
    }


def contents(directory):
    """Every file's bytes, by its name."""
    return {name: (directory / name).read_bytes() for name in names_in(directory)}


def params(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def assert_same_params(got, want):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
        params(got),
        params(want),
    )
