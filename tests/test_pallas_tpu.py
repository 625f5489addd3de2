"""The TPU kernels in Pallas's interpreter, which also looks for races.

Memory that nothing has written holds NaN there, and so does what a block has past the
end of its array.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpo_kernels import token_logprobs, tpu_tiling, verify
from dpo_kernels.backends import load_backend, pallas_tpu, xla
from dpo_kernels.devices import Device
from dpo_kernels.interface import STATS
from dpo_kernels.tiling import Problem
from dpo_kernels.tpu_tiling import TpuBackwardTile, TpuForwardTile

CASES = {case.name: case for case in verify.CASES}
ALIGNED, RAGGED = (32, 128, 512, 2**28), (70, 128, 700, 2**28)
VMEM = 100 * 2**20
FORWARD = TpuForwardTile(block_t=16, block_v=256, hidden_buffers=2, vmem_bytes=VMEM)
STREAMED = TpuBackwardTile(
    block_t=32, block_v=256, parts=2, cores=1, resident=False, vmem_bytes=VMEM
)


def tiled(resident: bool, cores: int) -> TpuBackwardTile:
    return replace(STREAMED, resident=resident, cores=cores)


@pytest.fixture(params=[1, 2], ids=["one core", "two cores"])
def cores(request):
    return request.param


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

    def use(backward: TpuBackwardTile = STREAMED) -> None:
        monkeypatch.setattr(tpu_tiling, "forward_tile", forward_tile)
        monkeypatch.setattr(tpu_tiling, "backward_tile", lambda _: backward)
        monkeypatch.setattr(tpu_tiling, "dlogits_tile", lambda _: STREAMED)

    use()
    return use


@pytest.fixture
def x64():
    # Not `with jax.enable_x64(True)`: the interpreter's threads have to see it, too.
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def check(shape, case):
    row = verify.verify_case("pallas_tpu", "bfloat16", shape, CASES[case])
    assert row.passed, row


@pytest.mark.parametrize(
    ("shape", "case"),
    [
        (ALIGNED, "plain"),
        (RAGGED, "all"),
        ((1, 128, 1, 2**28), "plain"),
        ((3, 128, 7, 2**28), "all"),
    ],
)
def test_errors_are_within_the_bound_that_plain_jax_sets(x64, shape, case):
    check(shape, case)


@pytest.mark.parametrize(
    ("resident", "case"),
    [(False, case) for case in CASES] + [(True, "padded"), (True, "all")],
)
def test_many_tiles(x64, small_tiles, resident, case):
    small_tiles(tiled(resident, cores=1))
    check(RAGGED, case)


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
def test_cores_share_the_vocabulary(x64, small_tiles, cores, resident):
    """Of three blocks the second of two cores has one."""
    small_tiles(tiled(resident, cores))
    check(RAGGED, "all")


def test_the_shared_backward_with_dlogits(x64, small_tiles, monkeypatch):
    monkeypatch.setattr(pallas_tpu, "backward", None)
    check(RAGGED, "all")


def arrays(T, V, D=128, seed=0):
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(T, D)), rng.normal(size=(V, D)) / D**0.5
    targets = rng.integers(0, V, size=T)
    return (
        jnp.asarray(hidden, jnp.bfloat16),
        jnp.asarray(head, jnp.bfloat16),
        jnp.asarray(targets, jnp.int32),
    )


def reference(hidden, head, targets, valid):
    """lse, logprob, and their sum's gradient, in float64."""
    h, w = np.asarray(hidden, np.float64)[:valid], np.asarray(head, np.float64)
    z = h @ w.T
    lse = np.log(np.exp(z).sum(axis=1))
    hit = np.arange(len(w))[None] == np.asarray(targets)[:valid, None]
    dz = hit - np.exp(z - lse[:, None])
    pad = len(hidden) - valid
    logprob = z[hit] - lse
    dhidden = np.pad(dz @ w, ((0, pad), (0, 0)))
    return np.pad(lse, (0, pad)), np.pad(logprob, (0, pad)), dhidden, dz.T @ h


# Blocks of 16 rows in the forward, of 32 in the backward, in two parts.
@pytest.mark.parametrize(
    ("resident", "num_valid"),
    [(False, 0), (False, 1), (False, 97), (False, 128), (False, 166)]
    + [(True, 0), (True, 32), (True, 33)],
)
def test_rows_past_num_valid_are_not_looked_at(small_tiles, resident, num_valid):
    small_tiles(tiled(resident, cores=1))
    hidden, head, targets = arrays(166, 300)
    padded = hidden.at[num_valid:].set(jnp.nan)
    marked = targets.at[num_valid:].set(-1)

    def loss(hidden, head):
        out = token_logprobs(
            hidden, head, marked, num_valid=num_valid, implementation="pallas_tpu"
        )
        return out.logprob.sum(), out

    (_, out), (dhidden, dhead) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        padded, head
    )
    lse, logprob, want_hidden, want_head = reference(hidden, head, targets, num_valid)
    np.testing.assert_allclose(out.lse, lse, rtol=0, atol=2e-6)
    np.testing.assert_allclose(out.logprob, logprob, rtol=0, atol=4e-6)
    # Two roundings to bfloat16, of 2**-9 of what is rounded.
    for ours, want in ((dhidden, want_hidden), (dhead, want_head)):
        limit = 2**-8 * max(1e-6, np.abs(want).max())
        np.testing.assert_allclose(np.asarray(ours, np.float64), want, 2**-7, limit)
    assert not np.asarray(dhidden)[num_valid:].any()


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["hidden", "head", "bias"])
def test_one_gradient_alone(small_tiles, wanted):
    hidden, head, targets = arrays(40, 300)
    bias = jnp.linspace(-1, 1, 300)

    def loss(implementation, *inputs):
        hidden, head, bias = inputs
        out = token_logprobs(
            hidden, head, targets, bias=bias, implementation=implementation
        )
        return (out.logprob * jnp.linspace(-1, 2, 40)).sum()

    def gradient(implementation, argument):
        grad = jax.grad(loss, argument)
        return grad(implementation, hidden, head, bias)

    both = jax.grad(loss, (1, 2, 3))("pallas_tpu", hidden, head, bias)[wanted]
    alone = gradient("pallas_tpu", wanted + 1)
    plain = np.asarray(gradient("xla", wanted + 1), np.float64)
    limit = 2**-7 * np.abs(plain).max()
    for ours in (alone, both):
        np.testing.assert_allclose(np.asarray(ours, np.float64), plain, 2**-7, limit)


def test_a_block_of_which_nothing_exists(small_tiles):
    hidden, head, targets = arrays(40, 600)
    bias = jnp.zeros((600,), jnp.float32).at[:256].set(-jnp.inf)
    # One target is among what does not exist: not even its own entry gets a gradient.
    targets = (256 + targets % 344).at[0].set(5)

    def loss(hidden, head):
        out = token_logprobs(
            *(hidden, head, targets),
            bias=bias,
            stats=STATS,
            implementation="pallas_tpu",
        )
        return out.logprob.sum(), out

    (_, out), (dhidden, dhead) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        hidden, head
    )
    z = (np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T)[:, 256:]
    np.testing.assert_allclose(
        out.lse, np.log(np.exp(z).sum(axis=1)), rtol=0, atol=2e-6
    )
    np.testing.assert_allclose(out.mean_logit, z.mean(axis=1), rtol=0, atol=2e-6)
    assert float(out.logprob[0]) == -np.inf and not bool(out.top1[0])
    np.testing.assert_array_equal(dhead[:256], 0)
    assert bool(jnp.isfinite(dhidden).all())


def test_the_vocabulary_over_devices(small_tiles):
    hidden, head, targets = arrays(40, 600)
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
    _, logprob, want_hidden, want_head = reference(hidden, head, targets, 40)
    np.testing.assert_allclose(value, logprob.sum(), rtol=1e-6)
    for ours, want in ((dhidden, want_hidden), (dhead, want_head)):
        limit = 2**-8 * np.abs(want).max()
        np.testing.assert_allclose(np.asarray(ours, np.float64), want, 2**-7, limit)


def problem(**changes) -> Problem:
    v6e = Device(platform="tpu", kind="TPU v6e", num_cores=1)
    values = {"T": 8, "D": 128, "V": 64, "dtype": jnp.dtype(jnp.bfloat16)}
    values |= {"workspace_bytes": 2**28, "device": v6e, "ragged": False}
    return Problem(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"D": 96}, "needs a hidden size that 128 divides; this is D=96"),
        (
            {"dtype": jnp.dtype(jnp.float32)},
            "needs bfloat16 inputs; these are float32",
        ),
        (
            {"device": Device(platform="cpu", kind="cpu")},
            "needs a TPU; this is cpu",
        ),
        (
            {"device": Device(platform="tpu", kind="TPU v4")},
            "needs a TPU v5e, v5p, v6e or 7x; this is TPU v4",
        ),
        (
            {"D": 2**20},
            "needs rows that fit into vector memory; these have D=1048576",
        ),
        ({}, None),
    ],
)
def test_what_it_cannot_do(changes, reason):
    asked = problem(**changes)
    assert pallas_tpu.unsupported(asked) == reason
    if reason is not None:
        with pytest.raises(NotImplementedError, match="use xla or auto"):
            load_backend("pallas_tpu", asked)
        assert load_backend("auto", asked) is xla
    else:
        assert load_backend("auto", asked) is pallas_tpu


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5p", "TPU v6 lite", "TPU7x"])
@pytest.mark.parametrize("T", [1, 100, 4096, 100_000])
@pytest.mark.parametrize("D", [128, 4096, 8192, 16384])
def test_blocks_fit_into_vector_memory(kind, T, D):
    device = Device(platform="tpu", kind=kind, num_cores=1)
    core = tpu_tiling.core_of(device)
    asked = problem(T=T, D=D, V=128256, device=device)
    forward, backward = tpu_tiling.forward_tile(asked), tpu_tiling.backward_tile(asked)
    assert core is not None and forward is not None
    row = 2 * D
    used = row * (2 * forward.block_t + 2 * forward.block_v)
    assert used + 4 * forward.block_t * forward.block_v < core.vmem_bytes
    assert tpu_tiling.dlogits_tile(asked) is not None
    # Where a block's two gradients do not fit the shared backward takes over.
    if backward is None:
        assert D == 16384 and core.vmem_bytes < 2**27
    else:
        rows = T * 3 * row if backward.resident else backward.block_t * 10 * row
        assert rows + 6 * row * backward.block_v < core.vmem_bytes
