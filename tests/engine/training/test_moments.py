"""Moments that are stored in 8 bits or bfloat16: what the rounding does to them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from engine.training.matrices import Block
from engine.training.moments import (
    FIRST,
    SECOND,
    SmallState,
    Tiles,
    decode,
    encode,
    tiles_of,
    to_bfloat16,
    with_small_moments,
)
from tests.engine.training.optimizer_runs import EPS, assert_near, moved, settings

TILES = Tiles(axis=-1, length=256)
PATH: tuple[str, ...] = ("x",)


def bits(shape, seed=0):
    drawn = np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32)
    return jnp.asarray(drawn)


def numbers(shape, octaves, seed=1):
    """Of both signs, evenly over so many octaves."""
    rng = np.random.default_rng(seed)
    size = 2.0 ** -rng.uniform(0, octaves, shape)
    return (rng.choice([-1, 1], shape) * size).astype(np.float32)


def block_of(shape: tuple[int, ...], *spec: Any) -> Block:
    return Block(
        shape=shape, spec=P(*spec), stacked=True, decayed=True, orthogonalized=False
    )


MATRIX = block_of((64, 256), None, None, None)


@pytest.mark.parametrize("code", [FIRST, SECOND], ids=["first", "second"])
def test_a_code_is_right_on_average_and_never_off_by_more_than_a_step(code):
    x = numbers((16, 256), code.steps + 4)
    x = x if code.signed else np.abs(x)
    draws = 256
    many = jnp.broadcast_to(x, (draws, *x.shape))
    codes, exponents = encode(many, bits(many.shape), code, TILES)
    got = np.asarray(decode(codes, exponents, code, TILES), np.float64)
    assert codes.dtype == jnp.uint8 and exponents.shape == (draws, 16, 1)
    top = np.abs(x).max(axis=1, keepdims=True)
    exact = np.ldexp(1.0, np.frexp(top)[1] - code.steps)  # the least difference
    step = np.maximum(np.ldexp(1.0, np.frexp(x)[1] - 4), exact)
    assert np.all(step <= np.maximum(np.abs(x) / 8, 2 * top * 2.0**-code.steps))
    assert np.all(np.abs(got - x) < step)
    # Half a step is the most that the deviation of one draw can be. (The bits are 16.)
    on_average = np.abs(got.mean(axis=0) - x) / step
    if code.least:
        assert got.min() > 0
        on_average = on_average[np.abs(x) >= np.broadcast_to(exact, x.shape)]
    assert on_average.max() < 5 * 0.5 / np.sqrt(draws) + 2.0**-16


@pytest.mark.parametrize("code", [FIRST, SECOND], ids=["first", "second"])
def test_what_does_not_change_is_stored_again_without_an_error(code):
    """Also where another number of its block grows, or falls."""
    x = jnp.abs(numbers((8, 256), 9))
    kept = decode(*encode(x, bits(x.shape), code, TILES), code, TILES)
    for factor in (1.0, 4.0, 0.25):
        changed = kept.at[:, 0].multiply(factor)
        again = encode(changed, bits(x.shape, 7), code, TILES)
        assert jnp.array_equal(decode(*again, code, TILES)[:, 1:], kept[:, 1:])
    zeros = encode(jnp.zeros((1, 256)), bits((1, 256)), code, TILES)
    assert not decode(*zeros, code, TILES).any()


def test_extreme_numbers_stay_finite_and_of_their_sign():
    for size in (1e-44, 1e-38, 1e-30, 1e30, 3e38):
        x = jnp.full((1, 256), -size, jnp.float32)
        first = decode(*encode(x, bits(x.shape), FIRST, TILES), FIRST, TILES)
        second = decode(*encode(-x, bits(x.shape), SECOND, TILES), SECOND, TILES)
        for found in (-first, second):
            assert jnp.isfinite(found).all() and (found >= 0).all()
            assert found.max() <= max(1.125 * size, 2.0**-107), size


def test_bfloat16_is_right_on_average():
    x = np.abs(numbers((1, 64), 8))
    many = jnp.broadcast_to(x, (4096, 64))
    got = np.asarray(to_bfloat16(many, bits(many.shape)), np.float64)
    step = np.ldexp(1.0, np.frexp(x)[1] - 8)
    assert np.all(np.abs(got - x) < step)
    assert np.all(np.abs(got.mean(axis=0) - x) < step * 5 * 0.5 / 64)


@pytest.mark.parametrize(
    "shape, spec, tensor, want",
    [
        # Llama-3.1-8B's: up, down, k, the embedding; each as on its meshes.
        ((14336, 4096), (None, "tensor", "fsdp"), 8, (-2, 256)),
        ((4096, 14336), (None, "fsdp", "tensor"), 1, (-1, 256)),
        ((1024, 4096), (None, None, "fsdp"), 16, (-2, 64)),
        ((128256, 4096), (("fsdp", "tensor"), None), 1, (-1, 256)),
        ((4096, 16), (None, "fsdp", None), 1, None),  # an adapter's, of rank 16
        ((16, 14336), (None, None, "tensor"), 1, (-1, 256)),
        ((4096,), (None, None), 1, None),
    ],
)
def test_blocks_lie_where_meshes_do_not_cut_them(shape, spec, tensor, want):
    found = tiles_of(block_of(shape, *spec), tensor)
    assert (found and (found.axis, found.length)) == want


def small_adam(**kept: Any) -> Any:
    """An Adam of float32 moments, and of others."""
    adam = optax.scale_by_adam(b2=0.999)
    options: Any = {"mu": "float32", "nu": "float32"} | kept
    blocks = {PATH: MATRIX}
    return adam, with_small_moments(adam, blocks, **options, tensor=1, seed=3)


def moments_of(state: Any):
    """An Adam's, as numbers."""
    inner, exponents = state.stored, state.exponents
    found = []
    for name, code in (("mu", FIRST), ("nu", SECOND)):
        x, shared = getattr(inner, name)["x"], getattr(exponents, name)["x"]
        tiles = tiles_of(MATRIX, tensor=1)
        assert tiles is not None
        whole = x.astype(jnp.float32)
        found.append(whole if shared is None else decode(x, shared, code, tiles))
    return found


def test_the_first_codes_are_computed_when_they_are_asked_for():
    """By the compiler, they took minutes: of zeros, which it knew."""
    _, optimizer = small_adam(mu="8bit", nu="8bit")
    compiled = jax.jit(optimizer.init).lower({"x": jnp.zeros((1, 64, 256))}).compile()
    assert " floor(" in str(compiled.as_text())


@pytest.mark.parametrize("kept, spacing", [("8bit", 2.0**-3), ("bfloat16", 2.0**-7)])
def test_second_moments_decay(kept, spacing):
    """Where the gradient ends, but of one number of each block, which stays large."""
    _, optimizer = small_adam(nu=kept)
    steps, beta2 = 300, 0.999
    first = {"x": jnp.asarray(np.abs(numbers((1, 64, 256), 4)))}
    later = {"x": jnp.zeros((1, 64, 256)).at[:, :, 0].set(1.0)}

    @jax.jit
    def run(state):
        _, state = optimizer.update(first, state)
        began = moments_of(state)[1]
        state = jax.lax.fori_loop(
            0, steps, lambda _, x: optimizer.update(later, x)[1], state
        )
        return began, moments_of(state)[1]

    with jax.numpy_dtype_promotion("standard"):
        began, ended = run(optimizer.init(first))
    share = np.asarray(ended / began, np.float64)[:, :, 1:]
    # Each step's rounding has at most the variance p (1 - p) spacing^2, where p is the
    # decay in spacings: so much of the number, which is below `began`.
    deviation = np.sqrt(steps * (1 - beta2) * spacing)
    assert abs(share.mean() - beta2**steps) < 5 * deviation / np.sqrt(share.size)
    assert share.std() < deviation
    if kept == "bfloat16":  # rounded to nearest none of them would have moved
        x = began.astype(jnp.bfloat16).astype(jnp.float32)
        assert jnp.array_equal((beta2 * x).astype(jnp.bfloat16).astype(jnp.float32), x)


@pytest.mark.parametrize("kept, spacing", [("8bit", 2.0**-3), ("bfloat16", 2.0**-7)])
def test_adam_differs_by_what_the_rounding_explains(kept, spacing):
    """Fifty steps of float32's Adam, and of the same with its moments stored so.

    Rounding is right on average, and its variance is at most a quarter of the square of
    the spacing, `spacing` of the number. So the variance of a moment that decays by
    beta is at most V <- beta^2 V + (moment^2 + beta^2 V) spacing^2 / 4. An update
    m / sqrt(v) is off by dm / sqrt(v) - u dv / 2 v, and the deviation of the sum of all
    of them is at most the sum of their deviations.
    """
    optimizer, small = small_adam(mu="8bit" if kept == "8bit" else "float32", nu=kept)
    scale = np.abs(numbers((1, 64, 256), 10))
    rng = np.random.default_rng(5)
    noise = rng.standard_normal((50, *scale.shape)) + 0.5
    grads = jnp.asarray(scale * noise, jnp.float32)
    of_mu = spacing if kept == "8bit" else 0.0

    def step(carry, grad):
        exact, rough, variances, moved = carry
        wanted, exact = optimizer.update({"x": grad}, exact)
        got, rough = small.update({"x": grad}, rough)
        found = []
        for beta, x, total, relative in (
            (0.9, exact.mu["x"], variances[0], of_mu),
            (0.999, exact.nu["x"], variances[1], spacing),
        ):
            kept_of = beta**2 * total
            found.append(kept_of + (x**2 + kept_of) * relative**2 / 4)
        t = exact.count.astype(jnp.float32)
        v = exact.nu["x"] / (1 - 0.999**t)
        m_error = found[0] / (1 - 0.9**t) ** 2 / v
        v_error = wanted["x"] ** 2 * found[1] / exact.nu["x"] ** 2 / 4
        bound = jnp.sqrt(m_error.mean()) + jnp.sqrt(v_error.mean())
        moved = moved + got["x"] - wanted["x"]
        return (exact, rough, found, moved), bound

    zeros = jnp.zeros(scale.shape)
    with jax.numpy_dtype_promotion("standard"):
        start = (optimizer.init({"x": zeros}), small.init({"x": zeros}))
        (exact, rough, variances, moved), bounds = jax.jit(
            lambda carry: jax.lax.scan(step, carry, grads)
        )((*start, [zeros, zeros], zeros))
        mu, nu = moments_of(rough)
    assert isinstance(rough, SmallState)
    for got, want, variance in (
        (mu, exact.mu["x"], variances[0]),
        (nu, exact.nu["x"], variances[1]),
    ):
        error = np.asarray(got - want, np.float64) / scale
        assert np.mean(error**2) <= np.mean(variance / scale**2)
    off = float(jnp.sqrt(jnp.mean(moved**2)))
    assert 0 < off < float(bounds.sum())


def test_meshes_store_the_same():
    """The very same codes: blocks are whole on each device, and so is what is drawn."""

    def run(sizes):
        config = settings("adamw", mu_dtype="8bit", nu_dtype="8bit")
        params, state = moved(config, sizes)
        return params, jax.device_get((state.stored, state.exponents))

    want, wanted = run((1, 1, 1))
    types = {x.dtype.name for x in jax.tree.leaves(wanted)}
    assert types == {"int32", "float32", "uint8", "int8"}
    params, stored = run((2, 2, 2))
    assert_near(params, want, 8 * EPS)
    for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(wanted), strict=True):
        # Of the vocabulary a mesh has rows besides, which are padding.
        np.testing.assert_array_equal(a[: len(b)] if b.ndim else a, b)
