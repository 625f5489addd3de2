"""What tests of all kernels share."""

import jax
import jaxtyping
import pytest


@pytest.fixture
def x64():
    """Float64, for the truth; in the threads of interpreters, too."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def unchecked():
    """The caller's own checks, without those of types that pytest alone enforces."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
