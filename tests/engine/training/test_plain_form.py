"""The weights of the plain form are the model's own, wherever they are."""

import jax
import numpy as np
import pytest

from engine.training import plain_form
from engine.training.plain_form import plain_batch, plain_model
from tests.engine.tiny_models import mesh_of, tiny_config, tiny_model
from tests.engine.training.step_runs import prompted_pairs

# Vocabularies of 101 are padded on it; rows are over two devices.
MESH = (1, 2, 2, 2)


def arrays(model):
    return {path: x.get_value() for path, x in model.variables().items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_one_device_they_are_whole(dtype):
    model = tiny_model(tiny_config("qwen3"), mesh_of(MESH), dtype=dtype)
    got = plain_model(model)
    assert got.mesh.size == 1 and got.dtype == model.dtype
    want = tiny_model(tiny_config("qwen3"), got.mesh)
    assert arrays(got)["embed",].shape[0] == 101
    for path, x in arrays(want).items():
        found = arrays(got)[path]
        assert found.devices() == set(got.mesh.devices.flat)
        # What each device has whole is not copied, and stays as precise as it is.
        rounded = x if model.variables()[path].is_fully_replicated else x.astype(dtype)
        np.testing.assert_array_equal(found, rounded)


@pytest.mark.parametrize("sizes", [MESH, (2, 1, 1, 2), (1, 2, 2)])
def test_on_the_same_devices_nothing_is_copied(sizes, monkeypatch):
    monkeypatch.setattr(plain_form, "_COPY", 0.0)
    model = tiny_model(tiny_config("gemma2"), mesh_of(sizes))
    got = plain_model(model)
    assert got.mesh.shape["sequence"] == 1 and got.mesh.size == model.mesh.size
    assert (got.mesh == model.mesh) == (len(sizes) == 3)
    want = tiny_model(tiny_config("gemma2"), got.mesh)
    for path, x in arrays(got).items():
        assert x.sharding == arrays(want)[path].sharding
        np.testing.assert_array_equal(x, arrays(want)[path])
        pointers = [
            {s.device: s.data.unsafe_buffer_pointer() for s in y.addressable_shards}
            for y in (x, arrays(model)[path])
        ]
        assert pointers[0] == pointers[1]


def test_what_is_whole_everywhere_is_always_little(monkeypatch):
    monkeypatch.setattr(plain_form, "_COPY", 0.0)
    model = tiny_model(tiny_config("llama"), mesh_of((2, 1, 1)))
    got = plain_model(model)
    assert got.mesh.size == 1
    for path, x in arrays(model).items():
        (own,) = (s.data for s in x.addressable_shards if s.device == jax.devices()[0])
        found = arrays(got)[path].unsafe_buffer_pointer()
        assert found == own.unsafe_buffer_pointer()


def test_each_sequence_has_a_row_of_its_own():
    pairs, members = prompted_pairs(7), np.array([5, 0, 2])
    batch = plain_batch(pairs, members, mesh_of((2, 1, 1)))
    assert batch.rows.spans is None and batch.rows.tokens.shape[:2] == (2, 4)
    # On two devices: pairs 5 and 0, then pair 2 and nothing.
    rows = batch.rows.tokens
    for place, pair in (((0, 0), 5), ((0, 2), 0), ((1, 0), 2)):
        for side in (0, 1):
            begin, end = pairs.offsets[2 * pair + side :][:2]
            got = rows[place[0], place[1] + side]
            np.testing.assert_array_equal(got[: end - begin], pairs.tokens[begin:end])
            assert not got[end - begin :].any()
    assert batch.pairs.weights[1, 1, 0] == 0 and batch.pairs.ref_logps is None
