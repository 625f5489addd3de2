import numpy as np
import pytest

from engine.errors import InputError
from engine.models.rope import Rope, inverse_frequencies
from tests.engine.hf_configs import FULL, LINEAR, LLAMA3, SLIDING, parse


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
@pytest.mark.parametrize("scaling_key", ["rope_scaling", "rope_parameters"])
def test_rope_scaling_old_and_new(scaling_key, type_key):
    scaling = {type_key: "llama3", **LLAMA3}
    if scaling_key == "rope_parameters":
        config = parse("llama", rope_parameters=scaling | {"rope_theta": 5e5})
    else:
        config = parse("llama", rope_scaling=scaling, rope_theta=5e5)
    want = Rope(
        rope_type="llama3",
        theta=5e5,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=64,
    )
    assert config.ropes == (want,) * 4
    linear = parse("llama", **{scaling_key: {type_key: "linear", "factor": 2}})
    assert linear.ropes[0] == Rope(rope_type="linear", theta=1e4, factor=2.0)


def test_llama3_takes_the_model_length_where_it_names_no_original():
    scaling = LLAMA3 | {"rope_type": "llama3"}
    del scaling["original_max_position_embeddings"]
    assert parse("llama", rope_scaling=scaling).ropes[0].original_max_position == 512


@pytest.mark.parametrize(
    ("model_type", "changes", "theta"),
    [
        # What transformers 5.23 makes of files that say the same thing twice.
        ("llama", {"rope_parameters": LINEAR | {"rope_theta": 5e5}}, 1e4),
        (
            "llama",
            {"rope_parameters": LINEAR | {"rope_theta": 5e5}, "rope_theta": 5e5},
            5e5,
        ),
        (
            "llama",
            {"rope_parameters": LINEAR | {"rope_theta": 5e5}, "rope_theta": 7e5},
            7e5,
        ),
        (
            "llama",
            {
                "rope_scaling": LINEAR | {"rope_theta": 3e5},
                "rope_parameters": LINEAR | {"rope_theta": 5e5},
                "rope_theta": 7e5,
            },
            3e5,
        ),
        (
            "llama",
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": LINEAR,
                "rope_theta": 7e5,
            },
            7e5,
        ),
        (
            "gemma3_text",
            {
                "rope_parameters": {
                    FULL: LINEAR | {"rope_theta": 9.0},
                    SLIDING: {"rope_type": "default"},
                }
            },
            9.0,
        ),
        (
            "gemma3_text",
            {
                "rope_scaling": LINEAR | {"rope_theta": 3.0},
                "rope_parameters": {FULL: LINEAR | {"rope_theta": 9.0}},
            },
            3.0,
        ),
    ],
)
def test_a_rope_that_is_said_twice(model_type, changes, theta, caplog):
    config = parse(
        model_type,
        **{"rope_scaling": LINEAR} | changes,
        layer_types=[FULL] * 4 if model_type == "gemma3_text" else "absent",
    )
    assert config.ropes == (Rope(rope_type="linear", theta=theta, factor=2.0),) * 4
    told = changes["rope_parameters"]
    told = told.get(FULL, told).get("rope_theta")
    assert ("overruled" in caplog.text) == (told not in (None, theta))


def test_a_theta_of_null_counts_as_one_that_is_not_there():
    rope = {"rope_type": "default", "rope_theta": 5e5}
    config = parse("llama", rope_theta=None, rope_parameters=rope)
    assert config.ropes[0].theta == 5e5
    with pytest.raises(InputError, match="rope_theta=None must be a finite number"):
        parse("llama", rope_theta=None)


def test_gemma3_ropes_old_and_new():
    layers = {"sliding_window_pattern": 2}
    local = Rope(rope_type="default", theta=7.0)
    far = Rope(rope_type="linear", theta=9.0, factor=8.0)
    old = parse(
        "gemma3_text",
        rope_theta=9.0,
        rope_local_base_freq=7.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        **layers,
    )
    new = parse(
        "gemma3_text",
        rope_parameters={
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 9.0},
            SLIDING: {"rope_type": "default", "rope_theta": 7.0},
        },
        **layers,
    )
    assert old.ropes == new.ropes == (local, far, local, far)


def test_llama3_frequencies_by_band():
    """Wavelengths over 64 are stretched 8 times, under 16 left, blended between."""
    rope = parse("llama", rope_scaling={"rope_type": "llama3", **LLAMA3}).ropes[0]
    plain = inverse_frequencies(Rope(rope_type="default", theta=rope.theta), 16)
    scaled = inverse_frequencies(rope, 16)
    np.testing.assert_allclose(plain, 1e4 ** (-np.arange(8) / 8), rtol=1e-6)
    wavelength = 2 * np.pi / plain
    long, short = wavelength > 64, wavelength < 16
    assert long.any() and short.any() and (~long & ~short).any()
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    between = ~long & ~short
    share = (64 / wavelength[between] - 1) / 3
    want = plain[between] * ((1 - share) / 8 + share)
    np.testing.assert_allclose(scaled[between], want, rtol=1e-6)
