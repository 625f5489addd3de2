"""The GPU kernels compile for an H200, which need not be here."""

import pytest

from bench import compiled
from bench.gpu import aot as gpu_aot

GOOD = {"kernel": "token_logprobs_forward", "spill_bytes": 0, "shared_bytes": 1}
GOOD |= {"wgmma": 4, "registers": 168}


def test_a_call_compiles_within_the_promise():
    results = compiled.rows_of("gpu")
    assert [row["implementation"] for row in results] == ["mosaic_gpu", "triton"]
    assert [gpu_aot.problems(row) for row in results] == [[], []]
    names = [kernel["kernel"] for kernel in results[0]["kernels"]]
    assert "token_logprobs_forward" in names and "token_logprobs_dlogits" in names


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spill_bytes": 4}, "token_logprobs_forward spills"),
        (
            {"shared_bytes": 2**20},
            "token_logprobs_forward takes too much shared memory",
        ),
        ({"wgmma": 0}, "token_logprobs_forward has no wgmma"),
        ({}, None),
    ],
)
def test_what_does_not_fit_is_named(change, problem):
    row = {"kernels": [GOOD | change], "implementation": "triton"}
    assert gpu_aot.problems(row) == ([] if problem is None else [problem])


def test_temporaries_above_the_bound_are_named():
    row = {"kernels": [], "implementation": "triton", "temp_bytes": 2, "bound_bytes": 1}
    assert gpu_aot.problems(row) == ["temporaries above the bound"]
