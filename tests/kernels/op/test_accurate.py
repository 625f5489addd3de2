"""The mended logarithm, and which accuracy the compiler is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_kernels import token_logprobs
from dpo_kernels.op import accurate
from dpo_kernels.op.devices import Device, pretended

# The greatest errors in ULP of the default logarithm of TPUs that is mended.
ROUGH = {"TPU v5 lite": 4030.5, "TPU v5e": 4030.5, "TPU v5p": 62, "TPU v4": 4030.5}


def device(kind: str) -> Device:
    return Device(platform="tpu", kind=kind, num_cores=1)


@pytest.mark.numerics
@pytest.mark.parametrize("kind", ROUGH)
@pytest.mark.parametrize("sign", [1, -1])
def test_log_is_within_1e_6_however_rough_the_default_is(monkeypatch, kind, sign):
    random = np.random.default_rng(0)
    x = np.exp(random.uniform(-3, 13, 20_000)).astype(np.float32)
    default = jnp.log
    error = np.float32(1 + sign * ROUGH[kind] * 2.0**-23)
    monkeypatch.setattr(accurate.jnp, "log", lambda x: default(x) * error)
    rough = np.asarray(accurate.jnp.log(x), np.float64)
    with pretended(device(kind)):
        mended = np.asarray(accurate.log(jnp.asarray(x)), np.float64)
    true = np.log(x.astype(np.float64))
    assert np.abs(rough - true).max() > 2e-5
    assert np.abs(mended - true).max() < 1e-6


@pytest.mark.parametrize("kind", ["TPU v5e", "TPU v6e"])
def test_log_of_what_has_none(kind):
    x = jnp.asarray([0, jnp.inf, jnp.nan, -1, 1], jnp.float32)
    with pretended(device(kind)):
        found = accurate.log(x)
    np.testing.assert_array_equal(
        found, np.asarray([-np.inf, np.inf, np.nan, np.nan, 0], np.float32)
    )


def asked(function) -> str:
    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    return jax.jit(lambda x: function(x)).lower(x).as_text()


def test_the_accurate_implementation_is_asked_for():
    assert "HIGHEST" in asked(accurate.exp)
    assert "HIGHEST" in asked(accurate.expm1)
    with pretended(device("TPU v5 lite")):
        assert "HIGHEST" in asked(accurate.log)
    # A logarithm that is good as it is would lose by an exponential that is not.
    with pretended(device("TPU7x")):
        assert "HIGHEST" not in asked(accurate.log)


def test_float32_matmuls_follow_the_default_precision():
    hidden = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    head = jax.ShapeDtypeStruct((500, 128), jnp.float32)
    targets = jax.ShapeDtypeStruct((64,), jnp.int32)

    def loss(hidden, head, targets):
        out = token_logprobs(hidden, head, targets, implementation="xla")
        return out.logprob.sum()

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    with jax.default_matmul_precision("highest"):
        text = gradient.lower(hidden, head, targets).as_text()
    # Logits and both gradients; the forward keeps what the logits anew would cost.
    assert text.count("dot_general") == 3
    assert text.count("precision = [HIGHEST, HIGHEST]") == 3
