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
    kernels = {kernel["kernel"]: kernel for kernel in results[0]["kernels"]}
    assert set(kernels) == {"token_logprobs_forward", "token_logprobs_dlogits"}
    assert kernels["token_logprobs_forward"]["reductions"] > 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"spill_bytes": 4}, "token_logprobs_forward spills"),
        (
            {"shared_bytes": 2**20},
            "token_logprobs_forward takes too much shared memory",
        ),
        ({"wgmma": 0}, "token_logprobs_forward has no wgmma"),
        (
            {"threads": 384, "cross_warp_reductions": 8},
            "token_logprobs_forward reduces across warps: warpgroups race",
        ),
        ({"threads": 128, "cross_warp_reductions": 8}, None),
        ({"threads": 384, "cross_warp_reductions": 0}, None),
        ({}, None),
    ],
)
def test_what_does_not_fit_is_named(change, problem):
    row = {"kernels": [GOOD | change], "implementation": "triton"}
    assert gpu_aot.problems(row) == ([] if problem is None else [problem])


def test_temporaries_above_the_bound_are_named():
    row = {"kernels": [], "implementation": "triton", "temp_bytes": 2, "bound_bytes": 1}
    assert gpu_aot.problems(row) == ["temporaries above the bound"]


MATRIX = (
    "#mosaic_gpu.TiledLayout<[[64, 8], [16, 8], [8, 8], [2]], warp_dims = [-7], "
    "lane_dims = [-3, -2], vector_dim = -1>"
)
OF_ROWS = (
    "#mosaic_gpu.TiledLayout<[[64], [16], [8], [1]], warp_dims = [-4], "
    "lane_dims = [-2, #mosaic_gpu.Replicated<times = 4>], vector_dim = -1>"
)
OF_COLUMNS = (
    "#mosaic_gpu.TiledLayout<[[8], [2]], warp_dims = [#mosaic_gpu.Replicated<times = "
    "4>], lane_dims = [#mosaic_gpu.Replicated<times = 8>, -2], vector_dim = -1>"
)


def test_reductions_across_warps_are_told_from_those_within_one():
    """As compiled kernels have them: sums of rows, of columns, and of everything."""
    lines = [
        f"%1 = vector.multi_reduction <add>, %0, %cst {{in_layouts = [{MATRIX}, {out}],"
        f" offset = 215040 : i32, out_layouts = [{out}]}} [1] : vector<64x32xf32>"
        for out in (OF_ROWS, OF_COLUMNS)
    ]
    lines += ["%2 = arith.addf %0, %1", "%3 = vector.reduction <add>, %1 : f32"]
    found = list(gpu_aot.warp_reductions("\n".join(lines)))
    assert found == [False, True, True]
