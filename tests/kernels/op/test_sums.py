"""Sums between offsets by every implementation, the kernels in their interpreters."""

import logging
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpo_kernels import sequence_sums
from dpo_kernels.op import choice, sums
from dpo_kernels.op.devices import Device
from tests.kernels.sums_interpreters import H200, V6E, running

IMPLEMENTATIONS = tuple(sums.BACKENDS)
CPU = Device(platform="cpu", kind="cpu")
A100 = Device(platform="gpu", kind="NVIDIA A100", num_cores=108, capability=(8, 0))


@dataclass(frozen=True, kw_only=True)
class Case:
    """Tokens, sequences and dtypes; `masked` is the share of weights that are 0."""

    T: int
    offsets: tuple[int, ...]
    dtype: str = "float32"
    weights: str | None = None
    masked: float = 0.3
    all_masked: tuple[int, int] = (0, 0)  # from the first of these tokens to the second


def _many(first: int, last: int, count: int) -> tuple[int, ...]:
    ends = np.random.default_rng(count).integers(first, last, count)
    return tuple(np.sort(ends).tolist())


CASES = {
    # Tokens before all sequences; empty sequences, ones of one token, one of which all
    # tokens are masked; more of them than a block of tokens or of offsets holds; then
    # sequences of several blocks, the last of which is moved back from past the end.
    "packed": Case(
        T=9001,
        offsets=(5, 5, 6, 127, 127, 127, 257, *_many(257, 900, 90), 4500, 8999),
        weights="float32",
        all_masked=(127, 257),
    ),
    # Offsets outside the array, and none that is weighted.
    "past the ends": Case(T=1003, offsets=(-40, -9, 2, 2, 3, 127, 640, 1040, 1100)),
    # Blocks of tokens that are all padding, and sequences of whole blocks before them.
    "padded": Case(
        T=2048, offsets=(0, 512, 1024, 1024), dtype="float16", weights="float32"
    ),
    "nothing": Case(T=200, offsets=(7, 7, 7), weights="float32"),
    "one token": Case(T=1, offsets=(0, 0, 1), weights="bfloat16", masked=0.0),
    "bfloat16": Case(
        T=515, offsets=(1, 200, 514), dtype="bfloat16", weights="bfloat16"
    ),
}


def inputs(case: Case):
    """Values, weights and cotangents; whatever is not counted is NaN."""
    rng = np.random.default_rng(case.T)
    values = rng.normal(size=case.T).astype(jnp.dtype(case.dtype))
    t = np.arange(case.T)
    values[(t < case.offsets[0]) | (t >= case.offsets[-1])] = np.nan
    cotangent = rng.normal(size=len(case.offsets) - 1).astype(np.float32)
    if case.weights is None:
        return values, None, cotangent
    weights = rng.normal(size=case.T).astype(jnp.dtype(case.weights))
    weights[np.isnan(values)] = np.inf
    gone = rng.random(case.T) < case.masked
    gone[slice(*case.all_masked)] = True
    values[gone], weights[gone] = np.nan, 0
    return values, weights, cotangent


def evaluate(implementation: str, values, weights, offsets, cotangent):
    """Sums, counts and the gradients of what may be differentiated."""
    offsets = jnp.asarray(offsets, jnp.int32)

    def loss(values, weights):
        sums, counts = sequence_sums(
            values, offsets=offsets, weights=weights, implementation=implementation
        )
        return (sums * cotangent).sum() + counts.sum(), (sums, counts)

    argnums = (0,) if weights is None else (0, 1)
    both = jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))
    # Before the interpreters are called back, which can wait for each other.
    args = jax.block_until_ready(jax.tree.map(jnp.asarray, (values, weights)))
    (_, results), grads = jax.block_until_ready(both(*args))
    assert [x.dtype for x in results] == ["float32", "float32"]
    given = (values,) if weights is None else (values, weights)
    assert [x.dtype for x in grads] == [x.dtype for x in given]
    return [np.asarray(x, np.float64) for x in (*results, *grads)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sums_and_gradients_against_float64(implementation, name, monkeypatch, capfd):
    case = CASES[name]
    values, weights, cotangent = inputs(case)
    with running(implementation, monkeypatch, capfd):
        got = evaluate(implementation, values, weights, case.offsets, cotangent)
    values, cotangent = values.astype(np.float64), cotangent.astype(np.float64)
    w = np.ones(case.T) if weights is None else weights.astype(np.float64)
    dsum, counted = np.zeros(case.T), np.zeros(case.T, bool)
    bounds = np.clip(case.offsets, 0, case.T)
    # What a float32 sum in some order may do. A gradient is rounded once more, to the
    # dtype of what it is of.
    eps = float(jnp.finfo(jnp.float32).eps)
    for r, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        t = first + np.flatnonzero(w[first:last])
        terms = w[t] * values[t]
        atol = eps * abs(terms).sum()
        np.testing.assert_allclose(got[0][r], terms.sum(), rtol=0, atol=atol)
        assert got[1][r] == len(t)
        dsum[first:last], counted[t] = cotangent[r], True
    others = (w,) if weights is None else (w, values)
    dtypes = (case.dtype, case.weights)
    for grad, other, dtype in zip(got[2:], others, dtypes, strict=False):
        assert not grad[~counted].any()
        truth = dsum[counted] * other[counted]
        info = jnp.finfo(dtype)
        np.testing.assert_allclose(
            grad[counted],
            truth,
            rtol=float(info.eps),
            atol=float(info.smallest_subnormal),
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_counts_beyond_256(implementation, monkeypatch):
    """A bfloat16 has no 257, and near 5000 only multiples of 32."""
    values = np.ones(5003).astype(jnp.bfloat16)
    with running(implementation, monkeypatch):
        cotangent = np.asarray([3, 2], np.float32)
        got = evaluate(implementation, values, None, (1, 2, 5002), cotangent)
    np.testing.assert_array_equal(got[0], [1, 5000])
    np.testing.assert_array_equal(got[1], [1, 5000])
    np.testing.assert_array_equal(got[2], [0, 3, *[2] * 5000, 0])


def test_segment_ids_count_bfloat16_beyond_256():
    values = jnp.ones(5003, jnp.bfloat16)
    ids = jnp.where(jnp.arange(5003) < 3, 0, 1)
    total, count = sequence_sums(values, ids, 2)
    assert total.dtype == count.dtype == jnp.float32
    np.testing.assert_array_equal(total, [3, 5000])
    np.testing.assert_array_equal(count, [3, 5000])
    gradient = jax.grad(lambda x: sequence_sums(x, ids, 2)[0][1])(values)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(gradient, np.float32)[2:4], [0, 1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_masked_token_has_no_gradient_even_where_that_is_infinite(
    implementation, monkeypatch
):
    values, weights = jnp.asarray([1.0, 2.0]), jnp.asarray([0.0, 1.0])

    def loss(values, weights):
        return (
            jnp.inf
            * sequence_sums(
                values,
                offsets=jnp.asarray([0, 2]),
                weights=weights,
                implementation=implementation,
            )[0].sum()
        )

    with running(implementation, monkeypatch):
        dvalues, dweights = jax.jit(jax.grad(loss, (0, 1)))(values, weights)
    np.testing.assert_array_equal(dvalues, [0, np.inf])
    np.testing.assert_array_equal(dweights, [0, np.inf])


def test_offsets_and_segment_ids_agree_bit_for_bit():
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.normal(size=500), jnp.float32)
    offsets = np.array([3, 100, 100, 480])
    ids = np.searchsorted(offsets, np.arange(500), side="right") - 1
    by_offsets = sequence_sums(values, offsets=jnp.asarray(offsets))
    by_ids = sequence_sums(values, jnp.asarray(ids), 3)
    np.testing.assert_array_equal(by_offsets, by_ids)


def test_float64():
    with jax.enable_x64(True):
        values = jnp.asarray([0.1, 0.2, 0.3])
        total, _ = sequence_sums(values, offsets=jnp.asarray([0, 3]))
        assert total.dtype == jnp.float64
        np.testing.assert_allclose(total, [0.6], rtol=1e-15)


def test_no_tokens_and_no_sequences():
    total, count = sequence_sums(jnp.zeros(0), offsets=jnp.asarray([0, 0, 0]))
    assert not total.any() and not count.any() and total.shape == (2,)
    total, count = sequence_sums(jnp.ones(3), offsets=jnp.asarray([1]))
    assert total.shape == count.shape == (0,)
    gradient = jax.grad(lambda x: sequence_sums(x, offsets=jnp.asarray([1]))[0].sum())
    np.testing.assert_array_equal(gradient(jnp.ones(3)), [0, 0, 0])


@pytest.mark.parametrize("shared", ["values", "weights"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inside_shard_map_with_types_checked(implementation, shared, monkeypatch):
    """Two devices with sequences of their own, and some tokens that both share."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    offsets = np.array([0, 1, 3, 1, 1, 3], np.int32)
    own, both = np.arange(6, dtype=np.float32), np.array([2, 0, 1], np.float32)

    def per_device(offsets, own, both):
        def loss(own, both):
            values, weights = (both, own) if shared == "values" else (own, both)
            total, count = sequence_sums(
                values, offsets=offsets, weights=weights, implementation=implementation
            )
            return (total * jnp.asarray([1.0, 10.0])).sum(), (total, count)

        return jax.grad(loss, (0, 1), has_aux=True)(own, both)

    specs = P("data"), P("data"), P()
    out_specs = ((P("data"), P()), (P("data"), P("data")))
    sharded = jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=out_specs)
    with running(implementation, monkeypatch):
        grads, results = jax.jit(sharded)(offsets, own, both)
    np.testing.assert_array_equal(results[0], [0, 2, 0, 5])
    # A weight of 0 masks, a value of 0 does not: own[0] is one or the other.
    masks = shared == "weights"
    np.testing.assert_array_equal(results[1], [masks, 2 - masks, 0, 2 - masks])
    first = 2 if masks else 0
    np.testing.assert_array_equal(grads[0], [first, 0, 10, 0, 0, 10])
    # Summed over the devices: the first token counts on one of them at most.
    middle = 0 if masks else 10 + 40
    np.testing.assert_array_equal(grads[1], [0, middle, 70])


def test_counts_have_no_gradient():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    def count(values):
        return sequence_sums(values, offsets=jnp.asarray([0, 2]))[1].sum()

    gradient = jax.shard_map(
        jax.grad(count), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    grads = jax.jit(gradient)(np.ones(6, np.float32))
    np.testing.assert_array_equal(grads, np.zeros(6))


def problem(device: Device, dtype: str = "float32") -> sums.Problem:
    dtypes = {"dtype": jnp.dtype(dtype), "weights_dtype": None}
    return sums.Problem(T=8, R=2, device=device, **dtypes)


def test_auto_takes_the_first_that_can_and_says_so(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger=choice.__name__)
    choice.log_choice.cache_clear()
    for device, dtype, name in (
        (H200, "float32", "mosaic_gpu"),
        (A100, "bfloat16", "triton"),
        (H200, "float64", "xla"),
        (V6E, "bfloat16", "pallas_tpu"),
        (CPU, "float32", "xla"),
    ):
        assert sums.load_backend("auto", problem(device, dtype)) is sums._choice.module(
            name
        )
        assert f"'auto' is '{name}'" in caplog.messages[-1]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert sums.load_backend("auto", problem(A100)) is sums._choice.module("xla")


@pytest.mark.parametrize(
    "name, device, dtype, message",
    [
        ("mosaic_gpu", A100, "float32", "capability 9.0 or newer; this is NVIDIA A100"),
        ("triton", CPU, "float32", "capability 8.0 or newer; this is cpu; use xla or"),
        ("triton", A100, "float64", "values is float64; use xla or auto"),
    ],
)
def test_a_backend_that_cannot_run_says_why(name, device, dtype, message):
    with pytest.raises(NotImplementedError, match=message):
        sums.load_backend(name, problem(device, dtype))
    with pytest.raises(NotImplementedError, match="implementation='triton' needs offs"):
        sequence_sums(jnp.ones(1), jnp.zeros(1, jnp.int32), 1, implementation="triton")
