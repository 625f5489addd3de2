"""The Triton kernels, run by Triton's interpreter and compiled for absent GPUs."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from dpo_kernels import token_logprobs
from dpo_kernels.op import gpu_tiling
from dpo_kernels.op.devices import Device
from dpo_kernels.op.gpu_tiling import TritonTile
from dpo_kernels.op.interface import STATS, LogitOptions, kept_scale
from dpo_kernels.op.loops import varying_axes
from dpo_kernels.op.tiling import Problem
from dpo_kernels.triton import logprobs as triton
from dpo_kernels.verify import table as verify

pytest.importorskip("jax_triton", reason="needs the extra cuda13 and the CUDA plugin")

from bench.gpu import triton_resources as gpu_triton_resources  # noqa: E402
from tests.kernels.inputs import arrays, logits_of  # noqa: E402
from tests.kernels.offsets import (  # noqa: E402
    check_entries_masked_by_a_finite_bias,
    check_two_equal_logits_of_1e8,
)
from tests.kernels.triton import interpreter as triton_interpreter  # noqa: E402

CASES = {case.name: case for case in verify.CASES}
TILE = TritonTile(
    block_t=32, block_v=64, block_d=16, group_t=2, num_warps=4, num_stages=2
)
# T, D, V, workspace, and how much of V it lets the forward keep for the backward. All
# multiples of the tile; none, and D not even of 2; less than a tile.
ALIGNED = (64, 32, 256, 2**16), "none"
RAGGED, KEPT = ((67, 19, 203, 40_000), "none"), ((67, 19, 203, 2**28), "all")
SOME = (45, 24, 299, 31_200), "some"
TINY = (1, 8, 3, 2**28), "all"


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The constants of each launch, by kernel."""
    constants = {"partials_kernel": [], "dlogits_kernel": []}

    def launch(kernel, *rest):
        constants[kernel].append(rest[-1])
        return triton_interpreter.launch(kernel, *rest)

    monkeypatch.setattr(triton, "_launch", launch)
    monkeypatch.setattr(triton, "unsupported", lambda problem: None)
    monkeypatch.setattr(gpu_tiling, "triton_tile", lambda device, dtype: TILE)
    return constants


@pytest.mark.parametrize(
    ("shape", "case", "dtype"),
    [
        (ALIGNED, "stats", "bfloat16"),
        *((RAGGED, case, "bfloat16") for case in CASES if case != "stats"),
        *((KEPT, case, "bfloat16") for case in ("stats", "softcap", "all", "huge")),
        *((RAGGED, "all", dtype) for dtype in ("float16", "float32")),
        *((KEPT, "all", dtype) for dtype in ("float16", "float32")),
        *((KEPT, case, "float32") for case in ("offset", "huge")),
        (SOME, "all", "bfloat16"),
        (TINY, "all", "bfloat16"),
        (TINY, "plain", "float32"),
    ],
)
def test_errors_are_within_the_bound_that_plain_jax_sets(
    x64, shape, case, dtype, launched
):
    sizes, kept = shape
    row = verify.verify_case("triton", dtype, sizes, CASES[case])
    assert row.passed, row
    keep_v = launched["partials_kernel"][0]["KEEP_V"]
    assert kept == ("all" if keep_v == sizes[2] else "some" if keep_v else "none")
    assert bool(launched["dlogits_kernel"]) == (kept != "all")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_two_equal_logits_of_1e8(dtype):
    check_two_equal_logits_of_1e8("triton", dtype, D=24)


def test_entries_masked_by_a_finite_bias():
    check_entries_masked_by_a_finite_bias("triton", "bfloat16")


def forward(hidden, head, targets, bias=None, num_valid=None, keep_v=0, **options):
    return triton.forward_partials(
        hidden,
        head,
        targets,
        bias,
        None if num_valid is None else jnp.int32(num_valid),
        options=LogitOptions(**options),
        workspace_bytes=0,
        keep_v=keep_v,
    )


@pytest.mark.parametrize("num_valid", [0, 1, 31, 32, 33, 64, 66, 67, 1000, -5])
def test_only_blocks_with_a_valid_row_are_computed(num_valid):
    hidden, head, targets = arrays(67, 19, 203, jnp.float32)
    valid = min(max(num_valid, 0), 67)
    want = logits_of(hidden, head)[:valid]
    padded = np.where(np.arange(67)[:, None] < valid, hidden, np.float32(np.nan))
    got, _ = forward(
        jnp.asarray(padded), head, targets, num_valid=num_valid, stats=STATS
    )
    top, sum_exp = np.asarray(got.max), np.asarray(got.sum_exp)
    for block, start in enumerate(range(0, 203, 64)):
        np.testing.assert_allclose(
            top[block, :valid], want[:, start : start + 64].max(1), rtol=1e-5
        )
    # The interpreter leaves NaN where no program wrote.
    assert np.isnan(sum_exp[:, valid:]).all()


@pytest.mark.parametrize(
    ("keep_v", "softcap", "dtype"),
    [
        (1, None, "bfloat16"),
        (64, 1.5, "float16"),
        (100, None, "float16"),
        (128, 1.5, "float32"),
        (203, None, "float32"),
        (203, 1.5, "bfloat16"),
    ],
)
def test_kept_exponentials(keep_v, softcap, dtype):
    hidden, head, targets = arrays(67, 19, 203, dtype)
    bias = np.zeros(203, jnp.dtype(dtype))
    bias[::7] = bias[64:128] = -np.inf
    given = hidden, head, targets, jnp.asarray(bias)
    _, kept = forward(*given, keep_v=keep_v, softcap=softcap)
    assert kept is not None and kept.block_v == 64 and kept.exp.shape == (67, keep_v)
    assert kept.exp.dtype == dtype and kept.shift.shape == (-(-keep_v // 64), 67)
    x = logits_of(hidden, head)
    tanh = np.tanh(x / softcap) if softcap else np.zeros_like(x)
    z = softcap * tanh if softcap else x
    # All of the second block is masked: its shift must be 0, not -inf.
    exists = np.asarray(bias, np.float32) != -np.inf
    z = np.where(exists, z, -np.inf)
    shift = np.repeat(np.asarray(kept.shift, np.float64), 64, axis=0).T[:, :keep_v]
    np.testing.assert_array_equal(shift[:, 64:128], 0)
    want = kept_scale(jnp.dtype(dtype)) * (1 - tanh**2)[:, :keep_v]
    want = want * np.exp(z[:, :keep_v] - shift)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(kept.exp, np.float64), want, rtol=eps + 1e-5, atol=1e-6 * want.max()
    )
    assert jax.eval_shape(forward, *given)[1] is None


def test_nothing_is_kept_beyond_keep_v():
    """Past its row's end lies the next row, where no address is out of bounds."""
    hidden, head, targets = arrays(33, 16, 150, jnp.float32)
    first = forward(hidden, head, targets, keep_v=70, softcap=2.0)[1]
    every = forward(hidden, head, targets, keep_v=150, softcap=2.0)[1]
    assert first is not None and every is not None
    np.testing.assert_array_equal(first.exp, every.exp[:, :70])


@pytest.mark.parametrize("target", [-(2**31), -1, 64, 2**31 - 1])
def test_a_target_elsewhere_has_no_logit(target):
    hidden, head, _ = arrays(5, 16, 40, jnp.float32)
    got, _ = forward(hidden, head, jnp.full((5,), target, jnp.int32))
    assert (got.target_logit == -jnp.inf).all()


@pytest.mark.parametrize("target", [0, 63, 64, 99])
def test_a_target_at_the_edge_of_a_block_is_found(target):
    """Alone in its block: another row's target would have the block searched, too."""
    hidden, head, _ = arrays(5, 16, 100, jnp.float32)
    targets = jnp.full((5,), -1, jnp.int32).at[2].set(target)
    got, _ = forward(hidden, head, targets)
    found = np.asarray(got.target_logit.max(axis=0))
    np.testing.assert_allclose(found[2], hidden[2] @ head[target], rtol=1e-5)
    assert (np.delete(found, 2) == -np.inf).all()


def test_tanh_keeps_its_digits():
    """At small x the quotient form alone would lose them all; 2e-7: 3 float32 ulp."""
    x = np.concatenate([np.logspace(-12, 1.5, 50), [0.59999, 0.6, 0.60001]])
    hidden = jnp.asarray(np.stack([x, -x]).reshape(-1, 1), jnp.float32)
    head, targets = jnp.ones((1, 1)), jnp.zeros(hidden.shape[0], jnp.int32)
    got, _ = forward(hidden, head, targets, softcap=1.0)
    want = np.tanh(np.asarray(hidden[:, 0], np.float64))
    np.testing.assert_allclose(np.asarray(got.max[0]), want, rtol=3e-7)


def test_a_target_without_probability_has_no_gradient():
    hidden, head, _ = arrays(5, 16, 40, jnp.float32)
    bias = jnp.zeros(40).at[7].set(-jnp.inf)
    ones = jnp.ones(5)
    dx = triton.dlogits(
        *(hidden, head, jnp.full((5,), 7, jnp.int32), bias, ones, ones, ones),
        options=LogitOptions(),
    )
    assert (dx[:, 7] == 0).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"dtype": jnp.dtype("float32")}, None),
        ({"dtype": jnp.dtype("float64")}, "needs bfloat16, float16, float32; .*64"),
        ({"device": Device(platform="cpu", kind="cpu")}, "an NVIDIA GPU; this is cpu$"),
        ({"device": Device(platform="rocm", kind="MI300X")}, r"MI300X \(rocm\)"),
        ({"device": Device(platform="gpu", kind="T4", capability=(7, 5))}, "8.0 or .*"),
        ({"device": Device(platform="gpu", kind="Unheard-of")}, "8.0 or .* Unheard-of"),
    ],
)
def test_what_it_cannot_do_is_said(changes, says, monkeypatch):
    monkeypatch.undo()
    h200 = Device(platform="gpu", kind="NVIDIA H200", num_cores=132, capability=(9, 0))
    problem = Problem(
        **{"T": 8, "D": 8, "V": 8, "workspace_bytes": 1, "ragged": False}
        | {"dtype": jnp.dtype("bfloat16"), "device": h200}
        | changes
    )
    reason = triton.unsupported(problem)
    if says is None:
        assert reason is None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "needs the package jax-triton" in str(triton.unsupported(problem))
    else:
        assert reason is not None
        assert re.search(says, reason)


@pytest.mark.parametrize("field", ["block_t", "block_v", "block_d"])
@pytest.mark.parametrize("value", [0, 8, 48])
def test_a_tile_that_triton_cannot_compile_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}={value} must be a power of two"):
        dataclasses.replace(TILE, **{field: value})


@pytest.mark.parametrize("check_vma", [True, False])
def test_results_vary_over_the_axes_of_the_inputs(check_vma, monkeypatch):
    """Traced for eight H200s, with jax-triton's own primitive, vocabulary cut."""
    monkeypatch.undo()
    h200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh(
        (2, 4),
        ("data", "vocab"),
        axis_types=(AxisType.Auto,) * 2,
        abstract_device=h200,
    )

    def local(hidden, head, targets):
        def loss(hidden, head):
            out = token_logprobs(
                hidden, head, targets, axis_name="vocab", implementation="triton"
            )
            assert varying_axes(out.logprob) == ({"data"} if check_vma else set())
            return out.logprob.sum()

        return jax.grad(loss, (0, 1))(hidden, head)

    specs = (P("data"), P("vocab"), P("data"))
    f = jax.shard_map(
        local, mesh=mesh, in_specs=specs, out_specs=specs[:2], check_vma=check_vma
    )
    shapes = ((256, 64), (1024, 64))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    with jax.sharding.use_abstract_mesh(mesh):
        targets = jax.ShapeDtypeStruct((256,), jnp.int32)
        got = jax.eval_shape(f, *arguments, targets)
    assert [x.shape for x in got] == list(shapes)


# One of each size of tile and of shared memory; bench.gpu.triton_resources has more.
@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA B200"])
def test_kernels_compile_within_the_shared_memory(kind, monkeypatch):
    monkeypatch.undo()
    cases = {case.name: case for case in gpu_triton_resources.CASES}
    # The A100 has the L4's tile, in more memory.
    for name in ("dlogits",) if "A100" in kind else ("forward", "dlogits"):
        case = cases[f"{name}, ragged"]
        found = gpu_triton_resources.resources(case, "bfloat16", kind)
        assert found.shared_bytes <= 1024 * gpu_triton_resources.SHARED_KIB[kind]
        assert "MMA" in found.matrix


@pytest.mark.parametrize("name", ["forward, engine", "forward, all", "dlogits, all"])
def test_kernels_compile_to_warpgroup_matmuls_without_spills(name, monkeypatch):
    monkeypatch.undo()
    (case,) = (c for c in gpu_triton_resources.CASES if c.name == name)
    found = gpu_triton_resources.resources(case, "bfloat16", "NVIDIA H200")
    assert found.spills == 0 and found.matrix == "4 HGMMA", found
