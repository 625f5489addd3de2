"""The Hopper kernels in Pallas's interpreter, which also looks for races."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_kernels import token_logprobs
from dpo_kernels.mosaic_gpu import logprobs as mosaic_gpu
from dpo_kernels.op.backends import load_backend
from dpo_kernels.op.devices import Device
from dpo_kernels.op.gpu_tiling import MosaicTile, mosaic_tile
from dpo_kernels.op.interface import STATS, LogitOptions, kept_scale
from dpo_kernels.op.tiling import Problem
from dpo_kernels.verify import table as verify
from tests.kernels.inputs import arrays, logits_of, verify_cases
from tests.kernels.offsets import (
    check_entries_masked_by_a_finite_bias,
    check_two_equal_logits_of_1e8,
)

CASES = {case.name: case for case in verify.CASES}
NARROW = MosaicTile(block_v=64)


@pytest.fixture(autouse=True)
def _interpreted(capfd):
    """Four streaming multiprocessors: two clusters, more tiles than they have room.

    The interpreter's own program is large, and each runs once.
    """
    with mosaic_gpu.interpreted(num_cores=4, detect_races=True):
        yield
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.fixture
def narrow(monkeypatch):
    """A quarter of a tile's columns: as many tiles and steps are run in less time."""
    monkeypatch.setattr(mosaic_gpu, "mosaic_tile", lambda _: NARROW)


def check(shape, cases, dtype):
    rows = verify_cases("mosaic_gpu", dtype, shape, [CASES[x] for x in cases])
    assert all(row.passed for row in rows), rows


# All but "plain" ask for stats. Of the vocabulary one chunk, and two.
@pytest.mark.parametrize(
    ("shape", "case", "dtype"),
    [
        ((256, 128, 512, 2**28), "plain", "bfloat16"),
        ((300, 64, 328, 2**18), "all", "bfloat16"),
        ((1, 64, 8, 2**28), "all", "bfloat16"),
    ],
)
def test_errors_are_within_the_bound_that_plain_jax_sets(x64, shape, case, dtype):
    check(shape, [case], dtype)


# More steps than there are stages, of whole tiles; and a last tile that ends early.
ALIGNED, RAGGED = (256, 128, 320, 2**28), (129, 64, 200, 2**28)


@pytest.mark.parametrize(
    ("shape", "cases", "dtype"),
    [
        (ALIGNED, ["all"], "float16"),
        (RAGGED, ["bias"], "bfloat16"),
        (RAGGED, ["softcap"], "bfloat16"),
        (RAGGED, ["padded", "empty"], "bfloat16"),
        (RAGGED, ["offset", "huge"], "float16"),
    ],
)
def test_many_tiles(x64, narrow, shape, cases, dtype):
    """Cases with the same options share a program."""
    check(shape, cases, dtype)


def test_two_equal_logits_of_1e8(narrow):
    check_two_equal_logits_of_1e8("mosaic_gpu", "bfloat16")


def test_entries_masked_by_a_finite_bias():
    check_entries_masked_by_a_finite_bias("mosaic_gpu", "bfloat16")


def test_rows_past_num_valid_are_not_looked_at(narrow):
    """Two tiles of a cluster are 256 rows: the edges of a row, a tile and a cluster."""
    hidden, head, targets = arrays(300, 64, 72)
    z = logits_of(hidden, head)
    lse = np.log(np.exp(z).sum(axis=1))
    logprob = z[np.arange(300), np.asarray(targets)] - lse
    # The count is an argument of one program.
    op = jax.jit(functools.partial(token_logprobs, implementation="mosaic_gpu"))
    for num_valid in (0, 1, 64, 128, 129, 256, 257, 300):
        padded = hidden.at[num_valid:].set(jnp.nan)
        marked = targets.at[num_valid:].set(-1)
        out = jax.block_until_ready(op(padded, head, marked, num_valid=num_valid))
        valid = np.arange(300) < num_valid
        np.testing.assert_allclose(out.lse, np.where(valid, lse, 0), rtol=0, atol=2e-6)
        np.testing.assert_allclose(
            out.logprob, np.where(valid, logprob, 0), rtol=0, atol=4e-6
        )


def test_clusters_of_padding_rows_are_skipped(narrow):
    """The interpreter fills what no kernel writes with NaN."""
    hidden, head, targets = arrays(600, 64, 72)
    partials, _ = mosaic_gpu.forward_partials(
        hidden,
        head,
        targets,
        None,
        jnp.int32(257),
        options=LogitOptions(),
        workspace_bytes=0,
        keep_v=0,
    )
    untouched = np.isnan(np.asarray(partials.max)).all(axis=0)
    np.testing.assert_array_equal(untouched, np.arange(600) >= 512)


@pytest.mark.parametrize(
    ("keep_v", "softcap", "dtype"),
    [
        (256, None, jnp.float16),
        (300, 2.0, jnp.float16),
        (600, 2.0, jnp.bfloat16),
    ],
)
def test_kept_exponentials(keep_v, softcap, dtype):
    hidden, head, targets = arrays(70, 64, 600, dtype)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=600), jnp.float32)
    bias = bias.at[3::7].set(-jnp.inf)
    if keep_v == 600:
        bias = bias.at[256:512].set(-jnp.inf)  # a whole block
    options = LogitOptions(softcap=softcap, scale=0.8, stats=STATS)
    partials, kept = mosaic_gpu.forward_partials(
        hidden,
        head,
        targets,
        bias,
        None,
        options=options,
        workspace_bytes=2**28,
        keep_v=keep_v,
    )
    assert kept is not None and kept.exp.shape == (70, keep_v)
    x = 0.8 * logits_of(hidden, head) + np.asarray(bias, np.float64)
    cap = x if softcap is None else softcap * np.tanh(x / softcap)
    slope = 1 if softcap is None else 1 - np.tanh(x / softcap) ** 2
    exists = np.isfinite(np.asarray(bias))
    for block, shift in enumerate(np.asarray(kept.shift, np.float64)):
        v = slice(block * kept.block_v, min(keep_v, (block + 1) * kept.block_v))
        top = np.where(exists, cap, -np.inf)[:, block * 256 : (block + 1) * 256]
        top = np.where(np.isfinite(top).any(axis=1), top.max(axis=1), 0)
        np.testing.assert_allclose(shift, top, rtol=0, atol=1e-5)
        exact = np.where(exists, slope * np.exp(cap - shift[:, None]), 0)[:, v]
        ours = np.asarray(kept.exp[:, v], np.float64) / kept_scale(jnp.dtype(dtype))
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(ours, exact, rtol=0.51 * eps + 1e-5, atol=1e-9)
    assert partials.num_logits is not None
    counted = [exists[:256].sum(), exists[256:512].sum(), exists[512:].sum()]
    np.testing.assert_array_equal(partials.num_logits[:, 0], counted)


def test_a_block_of_which_nothing_exists(narrow):
    hidden, head, targets = arrays(40, 64, 136)
    bias = jnp.zeros((136,), jnp.float32).at[:64].set(-jnp.inf)
    # One target is among what does not exist: not even its own entry gets a gradient.
    targets = (64 + targets % 72).at[0].set(5)

    def loss(hidden, head):
        out = token_logprobs(
            hidden, head, targets, bias=bias, implementation="mosaic_gpu"
        )
        return out.logprob.sum(), out.lse

    value_and_grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, lse), (dhidden, dhead) = value_and_grad(hidden, head)
    z = logits_of(hidden, head)[:, 64:]
    np.testing.assert_allclose(lse, np.log(np.exp(z).sum(axis=1)), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(dhead[:64], 0)
    assert bool(jnp.isfinite(dhidden).all())


def test_a_negative_scale(narrow):
    hidden, head, targets = arrays(40, 64, 72)
    out = token_logprobs(hidden, head, targets, scale=-1.5, implementation="mosaic_gpu")
    lse = np.log(np.exp(-1.5 * logits_of(hidden, head)).sum(axis=1))
    np.testing.assert_allclose(out.lse, lse, rtol=0, atol=4e-6)


def test_every_walk_over_the_tiles_gives_the_same_bits(monkeypatch):
    """Rows and vocabulary entries that no walk may leave out or do twice."""
    hidden, head, targets = arrays(600, 64, 136)
    results = []
    for tile in (
        NARROW,
        replace(NARROW, cluster=1, group_t=1),
        replace(NARROW, group_t=2, stages=2),
    ):
        monkeypatch.setattr(mosaic_gpu, "mosaic_tile", lambda _, tile=tile: tile)
        results.append(
            token_logprobs(hidden, head, targets, implementation="mosaic_gpu")
        )
    for other in results[1:]:
        np.testing.assert_array_equal(results[0].lse, other.lse)
        np.testing.assert_array_equal(results[0].logprob, other.logprob)


def problem(**changes) -> Problem:
    h200 = Device(platform="gpu", kind="NVIDIA H200", num_cores=132, capability=(9, 0))
    values = {"T": 8, "D": 64, "V": 64, "dtype": jnp.dtype(jnp.bfloat16)}
    values |= {"workspace_bytes": 2**28, "device": h200, "ragged": False}
    return Problem(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"D": 96}, "needs a hidden size that 64 divides; this is D=96"),
        ({"V": 50257}, "needs a vocabulary (slice) that 8 divides; this is V=50257"),
        (
            {"dtype": jnp.dtype(jnp.float32)},
            "needs bfloat16 or float16 inputs; these are float32",
        ),
        (
            {"device": Device(platform="gpu", kind="NVIDIA A100", capability=(8, 0))},
            "needs Hopper's tensor cores (compute capability 9.0, as the H100 and H200 "
            "have); this is NVIDIA A100 (compute capability 8.0)",
        ),
    ],
)
def test_what_it_cannot_do_it_says(changes, reason):
    assert mosaic_gpu.unsupported(problem()) is None
    assert mosaic_gpu.unsupported(problem(**changes)) == reason


def test_a_problem_it_does_not_cover_names_what_does():
    hidden, head, targets = arrays(8, 96, 64)
    with pytest.raises(NotImplementedError, match="D=96; use .*xla or auto$"):
        token_logprobs(hidden, head, targets, implementation="mosaic_gpu")


def test_groups_of_rows_stay_in_the_cache():
    assert mosaic_tile(problem(T=4096, D=4096, V=128256)).group_t == 8
    assert mosaic_tile(problem(T=16384, D=8192, V=128256)).group_t == 4
    assert mosaic_tile(problem(T=4096, D=262144, V=128256)).group_t == 1


@pytest.mark.parametrize(
    "changes",
    [{"block_t": 64}, {"block_v": 100}, {"block_d": 32}, {"cluster": 3}, {"stages": 5}],
)
def test_tiles_that_the_hardware_cannot_take_are_refused(changes):
    with pytest.raises(ValueError):
        MosaicTile(**changes)


def test_auto_takes_it_where_it_can():
    assert load_backend("auto", problem()) is mosaic_gpu
    assert load_backend("auto", problem(D=96)) is not mosaic_gpu
