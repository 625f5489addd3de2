"""The TPU kernels in Pallas's interpreter, which also looks for races.

Memory that nothing has written holds NaN there, and so does what a block has past the
end of its array.
"""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpo_kernels import reference, token_logprobs
from dpo_kernels.op.interface import STATS
from dpo_kernels.pallas_tpu import backward_tiling as tpu_backward_tiling
from dpo_kernels.pallas_tpu import logprobs as pallas_tpu
from dpo_kernels.pallas_tpu import matmuls as pallas_tpu_matmuls
from dpo_kernels.pallas_tpu import tiling as tpu_tiling
from dpo_kernels.pallas_tpu.backward_tiling import TpuBackwardTile
from dpo_kernels.verify import table as verify
from dpo_kernels.verify.cases import bound
from tests.kernels.inputs import arrays, forward, logits_of, logprobs, verify_cases
from tests.kernels.offsets import (
    check_entries_masked_by_a_finite_bias,
    check_two_equal_logits_of_1e8,
)
from tests.kernels.pallas_tpu.tiles import BACKWARD, FORWARD, LARGE, TWO_CORES

CASES = {case.name: case for case in verify.CASES}
ALIGNED, RAGGED = (64, 128, 512, 2**28), (50, 128, 600, 2**28)


@pytest.fixture(autouse=True)
def _interpreted(request, capfd):
    names = request.fixturenames
    count = request.getfixturevalue("cores") if "cores" in names else 1
    with pallas_tpu.interpreted("TPU v5p", cores=count, detect_races=True):
        yield
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.fixture
def small_tiles(monkeypatch):
    """Several blocks of rows and of the vocabulary, and a last one cut short."""

    def forward_tile(problem, **_):
        return replace(FORWARD, cores=problem.device.num_cores)

    def use(backward: TpuBackwardTile = BACKWARD) -> None:
        monkeypatch.setattr(tpu_tiling, "forward_tile", forward_tile)
        monkeypatch.setattr(tpu_backward_tiling, "backward_tile", lambda _: backward)

    use()
    return use


def check(shape, *cases):
    rows = verify_cases("pallas_tpu", "bfloat16", shape, [CASES[x] for x in cases])
    assert all(row.passed for row in rows), rows


@pytest.mark.parametrize(
    ("shape", "case"),
    [
        (RAGGED, "all"),
        ((3, 128, 7, 2**28), "all"),
    ],
)
def test_errors_are_within_the_bound_that_plain_jax_sets(x64, shape, case):
    check(shape, case)


# All but "plain" ask for stats. All together: above, and with two cores.
@pytest.mark.parametrize(
    ("shape", "cases"),
    [
        (ALIGNED, ["plain"]),
        (RAGGED, ["bias"]),
        (RAGGED, ["softcap"]),
        (RAGGED, ["padded", "empty"]),
        (RAGGED, ["offset", "huge"]),
    ],
)
def test_many_tiles(x64, small_tiles, shape, cases):
    """Cases with the same options share a program."""
    check(shape, *cases)


def test_two_equal_logits_of_1e8():
    check_two_equal_logits_of_1e8("pallas_tpu", "bfloat16")


def test_entries_masked_by_a_finite_bias(small_tiles):
    check_entries_masked_by_a_finite_bias("pallas_tpu", "bfloat16")


@cache
def wide(V):
    """Inputs, their truth, and how far from it a forward may be."""
    inputs = verify.make_inputs(40, 128, V, CASES["all"], "bfloat16")
    truth, plain = (
        forward(reference.token_logprobs, inputs, x) for x in ("float64", "bfloat16")
    )
    return inputs, truth, bound(verify.relative_error(plain, truth), "bfloat16")


# Of the last tile one slice and a narrower one; one and a whole one; less than one.
@pytest.mark.parametrize(
    ("V", "cores"), [(1700, 1), (1700, 2), (2048, 1), (1100, 1), (1100, 2)]
)
def test_the_last_tile_of_the_forward_has_slices_of_its_own(x64, monkeypatch, V, cores):
    tile = replace(FORWARD, block_v=1024, cores=cores)
    monkeypatch.setattr(tpu_tiling, "forward_tile", lambda *_, **__: tile)
    inputs, truth, limit = wide(V)
    op = partial(token_logprobs, implementation="pallas_tpu")
    assert verify.relative_error(forward(op, inputs, "bfloat16"), truth) <= limit


# Of 48 rows in pieces of 32, the second repeats half of the first.
@pytest.mark.parametrize(
    ("T", "block_t", "piece_t", "pieces_ahead", "counts", "cores"),
    [
        (70, 32, 16, 1, [None], 1),
        (81, 64, 16, 3, [None], 2),
        (64, 48, 32, 2, [None], 1),
        (166, 48, 32, 1, [96, 97], 1),
        (166, 96, 16, 6, [0, 97], 2),
    ],
)
def test_rows_arrive_in_pieces(
    monkeypatch, T, block_t, piece_t, pieces_ahead, counts, cores
):
    monkeypatch.setattr(tpu_tiling, "PIECE_T", piece_t)
    changes = {"block_t": block_t, "pieces_ahead": pieces_ahead, "cores": cores}
    tile = replace(FORWARD, parts=1, **changes)
    monkeypatch.setattr(tpu_tiling, "forward_tile", lambda *_, **__: tile)
    hidden, head, targets = arrays(T, 128, 300)
    # The count is an argument of one program.
    op = jax.jit(partial(token_logprobs, implementation="pallas_tpu"))
    for num_valid in counts:
        valid = T if num_valid is None else num_valid
        padded = hidden.at[valid:].set(jnp.nan)
        out = jax.block_until_ready(op(padded, head, targets, num_valid=num_valid))
        lse, logprob, *_ = logprobs(hidden, head, targets, valid)
        np.testing.assert_allclose(out.lse, lse, rtol=0, atol=2e-6)
        np.testing.assert_allclose(out.logprob, logprob, rtol=0, atol=4e-6)


def test_blocks_that_end_after_several_pieces(x64, small_tiles, monkeypatch):
    small_tiles(LARGE)
    monkeypatch.setattr(pallas_tpu_matmuls, "PIECE", 16)
    monkeypatch.setattr(pallas_tpu_matmuls, "PIECE_V", 256)
    check((70, *RAGGED[1:]), "all")


@pytest.mark.parametrize("cores", [2])
def test_cores_share_the_vocabulary(x64, small_tiles, cores):
    """Of three blocks the second of two cores has one."""
    small_tiles(TWO_CORES)
    check(RAGGED, "all")


@pytest.mark.parametrize("cores", [2])
def test_a_core_without_a_vocabulary(x64, small_tiles, cores):
    small_tiles(replace(TWO_CORES, share_v=1024))
    check(RAGGED, "bias")


# Blocks of 16 rows; for the gradient of the head sums over 32, or 192, which nothing
# fills.
@pytest.mark.parametrize(
    ("tile", "T", "counts"),
    [(BACKWARD, 70, [0, 1, 33, 64, 70]), (LARGE, 100, [0, 64, 65])],
    ids=["16 rows", "64 rows"],
)
def test_rows_past_num_valid_are_not_looked_at(small_tiles, tile, T, counts):
    small_tiles(tile)
    hidden, head, targets = arrays(T, 128, 300)

    @jax.jit  # of which the count is an argument
    def value_and_grad(hidden, head, targets, num_valid):
        def loss(hidden, head):
            out = token_logprobs(
                *(hidden, head, targets),
                num_valid=num_valid,
                implementation="pallas_tpu",
            )
            return out.logprob.sum(), out

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)

    for num_valid in counts:
        padded = hidden.at[num_valid:].set(jnp.nan)
        marked = targets.at[num_valid:].set(-1)
        (_, out), (dhidden, dhead) = jax.block_until_ready(
            value_and_grad(padded, head, marked, num_valid)
        )
        lse, logprob, *grads = logprobs(hidden, head, targets, num_valid)
        np.testing.assert_allclose(out.lse, lse, rtol=0, atol=2e-6)
        np.testing.assert_allclose(out.logprob, logprob, rtol=0, atol=4e-6)
        # Two roundings to bfloat16, of 2**-9 of what is rounded.
        for ours, want in zip((dhidden, dhead), grads, strict=True):
            limit = 2**-8 * max(1e-6, np.abs(want).max())
            np.testing.assert_allclose(np.asarray(ours, np.float64), want, 2**-7, limit)
        assert not np.asarray(dhidden)[num_valid:].any()


def test_one_gradient_alone(small_tiles):
    hidden, head, targets = arrays(20, 128, 300)
    bias, weights = np.linspace(-1, 1, 300), np.linspace(-1, 2, 20)

    def loss(hidden, head, bias):
        out = token_logprobs(
            hidden, head, targets, bias=bias, implementation="pallas_tpu"
        )
        return (out.logprob * jnp.asarray(weights, jnp.float32)).sum()

    p = np.exp(logits_of(hidden, head) + bias)
    p /= p.sum(axis=1, keepdims=True)
    dz = weights[:, None] * (np.eye(300)[np.asarray(targets)] - p)
    truth = dz @ np.asarray(head, float), dz.T @ np.asarray(hidden, float), dz.sum(0)
    # All together are in the tests above.
    for wanted, want in enumerate(truth):
        inputs = hidden, head, jnp.asarray(bias, jnp.float32)
        ours = np.asarray(jax.jit(jax.grad(loss, wanted))(*inputs), np.float64)
        np.testing.assert_allclose(ours, want, 2**-7, 2**-7 * np.abs(want).max())


def test_a_block_of_which_nothing_exists(small_tiles):
    hidden, head, targets = arrays(20, 128, 300)
    bias = jnp.zeros((300,), jnp.float32).at[:256].set(-jnp.inf)
    # One target is among what does not exist: not even its own entry gets a gradient.
    targets = (256 + targets % 44).at[0].set(5)

    def loss(hidden, head):
        out = token_logprobs(
            *(hidden, head, targets),
            bias=bias,
            stats=STATS,
            implementation="pallas_tpu",
        )
        return out.logprob.sum(), out

    value_and_grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, out), (dhidden, dhead) = value_and_grad(hidden, head)
    z = logits_of(hidden, head)[:, 256:]
    np.testing.assert_allclose(
        out.lse, np.log(np.exp(z).sum(axis=1)), rtol=0, atol=2e-6
    )
    np.testing.assert_allclose(out.mean_logit, z.mean(axis=1), rtol=0, atol=2e-6)
    assert float(out.logprob[0]) == -np.inf and not bool(out.top1[0])
    np.testing.assert_array_equal(dhead[:256], 0)
    assert bool(jnp.isfinite(dhidden).all())


def test_the_vocabulary_over_devices(small_tiles):
    hidden, head, targets = arrays(20, 128, 600)
    mesh = Mesh(np.array(jax.devices()[:2]), ("vocab",))

    def local(hidden, head, targets):
        return token_logprobs(
            hidden, head, targets, axis_name="vocab", implementation="pallas_tpu"
        ).logprob

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("vocab"), P()), out_specs=P()
    )
    value_and_grad = jax.value_and_grad(
        lambda h, w: sharded(h, w, targets).sum(), (0, 1)
    )
    value, (dhidden, dhead) = jax.jit(value_and_grad)(hidden, head)
    _, logprob, want_hidden, want_head = logprobs(hidden, head, targets, 20)
    np.testing.assert_allclose(value, logprob.sum(), rtol=1e-6)
    for ours, want in ((dhidden, want_hidden), (dhead, want_head)):
        limit = 2**-8 * np.abs(want).max()
        np.testing.assert_allclose(np.asarray(ours, np.float64), want, 2**-7, limit)


def test_a_workspace_that_is_too_small_is_refused():
    hidden, head, targets = arrays(40, 128, 300)

    def loss(hidden):
        options = {"workspace_bytes": 20_000, "implementation": "pallas_tpu"}
        return token_logprobs(hidden, head, targets, **options).logprob.sum()

    # 48 rows of 256 logits of two bytes each, and a sixteenth of all for the rest.
    with pytest.raises(ValueError, match="=20000 is too small .* give at least 26215"):
        jax.eval_shape(jax.grad(loss), hidden)
