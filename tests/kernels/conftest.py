"""What tests of all kernels share."""

import jax
import jaxtyping
import numpy as np
import pytest
from jax._src import callback  # JAX has no public way to look into either
from jax._src.pallas.mosaic_gpu.interpret import shared_memory


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


@pytest.fixture(autouse=True)
def _called_back_with_numpy():
    """Interpreters are called back with NumPy's arrays, of their own.

    JAX puts each on a device first. The interpreters make NumPy's of them again, and
    that way there and back is a third of all the time of a kernel that they run.
    """
    as_integer = shared_memory._to_int

    def call(*args, callback, **_):
        results = callback(*(np.array(x)[()] for x in args))
        return jax.tree.map(np.asarray, results)

    def to_int(x):
        return int(x) if isinstance(x, np.integer) else as_integer(x)

    # Not the fixture, which tests undo.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callback, "io_callback_impl", call)
        patch.setattr(shared_memory, "_to_int", to_int)
        yield
