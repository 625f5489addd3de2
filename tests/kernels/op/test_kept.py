"""The backward from kept exponentials: as exact as the one that recomputes them."""

import bisect
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpo_kernels import reference, token_logprobs
from dpo_kernels.op import tiling
from dpo_kernels.op.devices import Device
from dpo_kernels.op.interface import LogitOptions
from dpo_kernels.op.tiling import choice
from dpo_kernels.verify import table as verify
from dpo_kernels.verify.cases import FLOOR, SLACK
from dpo_kernels.verify.table import CASES, Case, evaluate, make_inputs, relative_error
from dpo_kernels.xla import logprobs as xla

T, D, V = 40, 16, 300
ALL = CASES[-1]


@pytest.fixture(autouse=True)
def narrow_chunks(monkeypatch):
    """Several of them, and of blocks of rows where there are more than 256."""
    monkeypatch.setattr(choice, "_CPU_TILE_BYTES", 2**15)


@pytest.fixture
def kept(monkeypatch):
    """The `keep_v` of every forward that is traced."""
    asked = []
    forward_partials = xla.forward_partials

    def spy(*args, keep_v, **kwargs):
        asked.append(keep_v)
        return forward_partials(*args, keep_v=keep_v, **kwargs)

    monkeypatch.setattr(xla, "forward_partials", spy)
    return asked


def workspace(keep: str, dtype: str = "float32", rows: int = T, ragged: bool = False):
    """The most bytes in which nothing is kept, the least for a part, and for all."""

    def keep_v(workspace_bytes: int) -> int:
        problem = tiling.Problem(
            T=rows,
            D=D,
            V=V,
            dtype=jnp.dtype(dtype),
            workspace_bytes=workspace_bytes,
            device=Device(platform="cpu", kind="cpu"),
            ragged=ragged,
        )
        return tiling.backward_tile(problem, fused=False).keep_v

    sizes = range(2**16, 2**21, 2**11)
    if keep == "none":
        return sizes[bisect.bisect_left(sizes, 1, key=keep_v) - 1]
    return sizes[bisect.bisect_left(sizes, 1 if keep == "some" else V, key=keep_v)]


def as_asked(keep: str, keep_v: int) -> bool:
    return {"none": keep_v == 0, "some": 0 < keep_v < V, "all": keep_v == V}[keep]


def with_workspace(workspace_bytes: int):
    def op(*args, **kwargs):
        return token_logprobs(*args, workspace_bytes=workspace_bytes, **kwargs)

    return op


@pytest.mark.parametrize("dtype", verify.DTYPES)
@pytest.mark.parametrize("keep", ["some", "all"])
def test_errors_are_within_the_bound_that_plain_jax_sets(x64, kept, dtype, keep):
    """With soft-cap, scale, entries taken away, and NaN in padding rows."""
    size = workspace(keep, dtype, ragged=True)
    row = verify.verify_case("xla", dtype, (T, D, V, size), ALL)
    assert row.passed, str(row)
    assert len(kept) == 1 and as_asked(keep, kept[0])


@pytest.mark.parametrize("case", CASES[2:4], ids=lambda case: case.name)
def test_each_option_alone(x64, case):
    row = verify.verify_case("xla", "float32", (T, D, V, workspace("all")), case)
    assert row.passed, str(row)


def test_the_plain_forward_keeps_nothing(kept):
    hidden, head = jnp.ones((T, D)), jnp.ones((V, D))
    targets = jnp.zeros(T, jnp.int32)
    op = with_workspace(workspace("all"))
    jax.jit(op).lower(hidden, head, targets)
    assert kept == [0]
    jax.jit(jax.grad(lambda h: op(h, head, targets).logprob.sum())).lower(hidden)
    assert kept == [0, V]


def test_keeping_saves_a_matmul(monkeypatch):
    monkeypatch.setattr(choice, "_CPU_TILE_BYTES", 2**20)  # a single chunk
    hidden, head = jnp.ones((T, D)), jnp.ones((V, D))
    targets = jnp.zeros(T, jnp.int32)

    def matmuls(workspace_bytes):
        def loss(hidden, head):
            op = with_workspace(workspace_bytes)
            return op(hidden, head, targets).logprob.sum()

        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, head)
        return lowered.as_text().count("dot_general")

    assert (matmuls(workspace("none")), matmuls(workspace("all"))) == (4, 3)


@pytest.mark.parametrize(
    "keep, heights", [("some", (300,)), ("all", (300,)), ("some", (128, 256, 300))]
)
def test_padding_rows_give_zero_and_get_zero_in_one_program(
    x64, kept, monkeypatch, keep, heights
):
    """Their kept exponentials are NaN, in blocks of rows that valid ones share."""
    rows = heights[-1]
    # Several, as on a GPU.
    monkeypatch.setattr(choice, "_heights", lambda _: heights)
    inputs = make_inputs(rows, D, V, Case(name="", bias=True), "float32")
    inputs.arrays["bias"] += 100  # whose exponential is infinite
    op = with_workspace(workspace(keep, rows=rows, ragged=True))
    for num_valid in (0, 1, 256, 257):
        hidden, cotangents = inputs.arrays["hidden"].copy(), inputs.cotangents.copy()
        hidden[num_valid:] = cotangents[:, num_valid:] = np.nan
        padded = dataclasses.replace(
            inputs,
            arrays=inputs.arrays | {"hidden": hidden},
            cotangents=cotangents,
            num_valid=num_valid,
        )
        out, grads = evaluate(op, padded, "float32")
        for x in jax.tree.leaves((out, grads["hidden"])):
            assert not np.asarray(x[num_valid:]).any(), num_valid
        # With a cotangent of 0 a row adds nothing, and gets nothing.
        alone = dataclasses.replace(inputs, cotangents=inputs.cotangents.copy())
        alone.cotangents[:, num_valid:] = 0
        truth = evaluate(reference.token_logprobs, alone, "float64")[1]
        plain = evaluate(reference.token_logprobs, alone, "float32")[1]
        bound = SLACK * relative_error(plain, truth) + FLOOR
        assert relative_error(grads, truth) < bound, num_valid
    assert len(kept) == 1 and as_asked(keep, kept[0])
    assert verify.program(op, inputs.options)._cache_size() == 1


def test_a_block_that_is_masked_away_gives_no_nan(x64):
    """Its shift is 0, far above the lse of -300 and less."""
    inputs = make_inputs(T, D, V, Case(name="", bias=True), "float32")
    bias = np.where(np.arange(V) < 170, -np.inf, -400).astype(np.float32)
    inputs = dataclasses.replace(
        inputs,
        arrays=inputs.arrays | {"bias": bias},
        targets=np.arange(T, dtype=np.int32) + 200,
    )
    truth = evaluate(reference.token_logprobs, inputs, "float64")
    plain = evaluate(reference.token_logprobs, inputs, "float32")
    ours = evaluate(with_workspace(workspace("all")), inputs, "float32")
    bound = SLACK * relative_error(plain, truth) + FLOOR
    assert relative_error(ours, truth) < bound


def test_what_the_forward_keeps():
    """By its definition, with a block that has nothing to keep."""
    inputs = make_inputs(T, D, V, Case(name="", bias=True, softcap=2.0), "float32")
    bias = np.where(np.arange(V) < 170, -np.inf, inputs.arrays["bias"])
    forward = functools.partial(
        xla.forward_partials,
        options=LogitOptions(softcap=2.0),
        workspace_bytes=workspace("all"),
        keep_v=290,
    )
    _, kept = jax.jit(forward)(
        jnp.asarray(inputs.arrays["hidden"]),
        jnp.asarray(inputs.arrays["head"]),
        jnp.asarray(inputs.targets),
        jnp.asarray(bias, jnp.float32),
        None,
    )
    assert kept is not None and kept.block_v < 170 and np.isfinite(kept.shift).all()
    tanh = np.tanh((inputs.arrays["hidden"] @ inputs.arrays["head"].T + bias) / 2)
    shift = np.asarray(kept.shift)[np.arange(290) // kept.block_v].T
    want = (1 - tanh**2)[:, :290] * np.exp(2 * tanh[:, :290] - shift)
    want[:, bias[:290] == -np.inf] = 0
    assert kept.exp.shape == (T, 290)
    assert relative_error(kept.exp, want) < 1e-5


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_targets_that_do_not_exist_get_no_gradient(x64, softcap):
    """Outside the vocabulary, or taken away by the bias."""
    inputs = make_inputs(T, D, V, Case(name="", bias=True, softcap=softcap), "float32")
    targets = np.resize(np.array([-1, V, 7 * 3, 5], np.int32), T)
    inputs.arrays["bias"][21] = -np.inf
    inputs = dataclasses.replace(inputs, targets=targets)

    def grads(keep: str):
        return evaluate(with_workspace(workspace(keep)), inputs, "float32")[1]

    assert relative_error(grads("all"), grads("none")) < 1e-6


def test_float16_keeps_probabilities_that_would_flush_to_zero(x64):
    """Beside an entry of their block that has nearly all of the probability."""
    inputs = make_inputs(T, D, V, Case(name="", bias=True), "float16")
    inputs = dataclasses.replace(
        inputs,
        arrays=inputs.arrays | {"bias": np.where(np.arange(V) == 3, 15, 0)},
        targets=np.full(T, 3, np.int32),
        cotangents=np.stack([np.full(T, 1e4), np.zeros(T)]),
    )

    def improbable(results):
        return results[1]["head"][100:150]

    truth = improbable(evaluate(reference.token_logprobs, inputs, "float64"))
    plain = improbable(evaluate(reference.token_logprobs, inputs, "float16"))
    op = with_workspace(workspace("all", "float16"))
    ours = improbable(evaluate(op, inputs, "float16"))
    bound = SLACK * relative_error(plain, truth) + FLOOR
    assert relative_error(ours, truth) < bound


@pytest.mark.parametrize("keep", ["some", "all"])
def test_vocab_parallel_equals_one_device(keep):
    """Each device keeps of its own slice."""
    case = Case(name="", softcap=2.0, bias=True)
    inputs = make_inputs(T, D, 2 * V, case, "float32")
    cotangents = jnp.asarray(inputs.cotangents, jnp.float32)
    targets = jnp.asarray(inputs.targets)

    def loss(op, hidden, head, bias):
        out = op(hidden, head, targets, bias=bias, softcap=2.0)
        return (cotangents[0] * out.logprob + cotangents[1] * out.lse).sum()

    def local(hidden, head, bias):
        def op(*args, **kwargs):
            kwargs |= {"axis_name": "vocab"}
            return with_workspace(workspace(keep))(*args, **kwargs)

        return loss(op, hidden, head, bias)

    sharded = jax.shard_map(
        local,
        mesh=Mesh(np.array(jax.devices()[:2]), ("vocab",)),
        in_specs=(P(), P("vocab"), P("vocab")),
        out_specs=P(),
    )
    args = [jnp.asarray(inputs.arrays[name]) for name in ("hidden", "head", "bias")]
    ours = jax.jit(jax.grad(sharded, (0, 1, 2)))(*args)
    one = jax.grad(lambda *a: loss(with_workspace(workspace("none")), *a), (0, 1, 2))
    assert relative_error(ours, jax.jit(one)(*args)) < 2e-6


def h200(ragged: bool, workspace_bytes: int) -> tiling.BackwardTile:
    problem = tiling.Problem(
        T=4096,
        D=4096,
        V=128256,
        dtype=jnp.dtype(jnp.bfloat16),
        workspace_bytes=workspace_bytes,
        device=Device(platform="gpu", kind="NVIDIA H200", capability=(9, 0)),
        ragged=ragged,
    )
    return tiling.backward_tile(problem, fused=True)


def test_a_gibibyte_keeps_everything_in_place_on_an_h200():
    tile = h200(ragged=False, workspace_bytes=2**30)
    assert (tile.block_t, tile.chunk_v, tile.keep_v) == (4096, 128256, 128256)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("mebibytes", [64, 256, 900, 4096])
def test_tile_and_kept_share_the_workspace(ragged, mebibytes):
    tile = h200(ragged, mebibytes * 2**20)
    kept = 2 * 4096 * tile.keep_v
    masked = 2 * 4096 * tile.block_t if ragged else 0
    # Its gradients, the chunk of the head and that of its gradient.
    chunk = 2 * (tile.block_t + 2 * 4096) * tile.chunk_v
    if tile.chunk_v == tile.keep_v == 128256 and not ragged:
        chunk = 0  # in place
    assert kept + masked + chunk <= mebibytes * 2**20
    assert tile.keep_v == 128256 or tile.keep_v % tile.chunk_v == 0
    assert tile.chunk_v % 128 == 0 and tile.chunk_v >= min(4096, 20 * mebibytes)
    least = {64: 0, 256: 0, 900: 75000, 4096: 128256}
    assert tile.keep_v >= least[mebibytes]
    assert tile.heights[-1] == 4096 and len(tile.heights) == (4 if ragged else 1)
