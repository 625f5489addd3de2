"""The mended logarithm, and which exponentials the TPU's compiler is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_kernels import accurate

# The greatest errors in ULP of the default logarithm of TPUs: v6e and 7x, v5p, v5e.
ROUGH = (2.5, 62, 4030.5)


@pytest.mark.parametrize("ulps", [s * u for u in ROUGH for s in (1, -1)])
def test_log_is_within_1e_6_however_rough_the_default_is(monkeypatch, ulps):
    random = np.random.default_rng(0)
    x = np.exp(random.uniform(-3, 13, 20_000)).astype(np.float32)
    default = jnp.log
    error = np.float32(1 + ulps * 2.0**-23)
    monkeypatch.setattr(accurate.jnp, "log", lambda x: default(x) * error)
    rough = np.asarray(accurate.jnp.log(x), np.float64)
    mended = np.asarray(accurate.log(jnp.asarray(x)), np.float64)
    true = np.log(x.astype(np.float64))
    assert np.abs(mended - true).max() < 1e-6
    if abs(ulps) > 10:
        assert np.abs(rough - true).max() > 2e-5


def test_log_of_what_has_none():
    x = jnp.asarray([0, jnp.inf, jnp.nan, -1, 1], jnp.float32)
    np.testing.assert_array_equal(
        accurate.log(x), np.asarray([-np.inf, np.inf, np.nan, np.nan, 0], np.float32)
    )


@pytest.mark.parametrize("function", [accurate.exp, accurate.expm1, accurate.log])
def test_the_accurate_implementation_is_asked_for(function):
    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    assert "HIGHEST" in jax.jit(function).lower(x).as_text()
