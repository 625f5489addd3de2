"""What the tests of training share."""

import pytest


@pytest.fixture(autouse=True)
def _cheaply_compiled(request):
    """Programs as XLA makes them, in code that LLVM has not optimised.

    That is a third of what compiling them costs, and a tiny model gains nothing by it.
    What is said of rounding is said of the code that users run.
    """
    if request.node.get_closest_marker("numerics") is None:
        request.getfixturevalue("unoptimised")
    yield
