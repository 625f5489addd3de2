import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.models.attention.tiles import attend
from engine.parallel.batch import KeySpans
from tests.engine.tiny_models import relative

R, S, N, K, H = 3, 29, 4, 2, 8


def spans_of(groups_of_rows, rows=R, length=S) -> KeySpans:
    """Rows of groups, each (shared tokens, own tokens of each sequence, ...)."""
    assert len(groups_of_rows) == rows
    found = [KeySpans.of_groups(groups, length) for groups in groups_of_rows]
    return KeySpans(*map(np.concatenate, zip(*found, strict=True)))


SPANS = {
    "padded": None,
    "packed": spans_of([[(0, 7), (0, 9), (0, 13)], [(0, 29)], [(0, 1), (0, 20)]]),
    "shared": spans_of(
        [[(11, 8, 10)], [(3, 2, 6), (0, 4, 3), (9, 1, 1)], [(1, 12, 3)]]
    ),
}


def visible(spans: KeySpans | None, window: int | None) -> np.ndarray:
    """[R, query, key], one sequence after another: what each would see alone."""
    seen = np.zeros((R, S, S), bool)
    for r, i in np.ndindex(R, S):
        if spans is None:
            keys = list(range(i + 1))
        else:
            first, shared_end, begin = (int(x[r, i]) for x in spans)
            keys = [*range(first, shared_end), *range(begin, i + 1)]
        seen[r, i, keys[-window:] if window else keys] = True
    return seen


def plain_attention(query, key, value, seen, scale, softcap):
    """All scores at once, in the dtype of the arguments."""
    grouped = query.reshape(R, S, K, N // K, H)
    scores = scale * jnp.einsum("RQKGH,RSKH->RKGQS", grouped, key)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("RKGQS,RSKH->RQKGH", weights, value).reshape(R, S, N, H)


def inputs():
    rng = np.random.default_rng(0)
    query = rng.standard_normal((R, S, N, H))
    return query, *rng.standard_normal((2, R, S, K, H))


def with_gradient(function, args):
    def scalar(*args):
        return jnp.sum(jnp.sin(3 * function(*args)))

    both = jax.jit(lambda *args: (function(*args), jax.grad(scalar, (0, 1, 2))(*args)))
    return both(*args)


@functools.cache
def truth(arrangement, window, softcap):
    """Of all scores at once, in float64."""
    seen = visible(SPANS[arrangement], window)
    plain = functools.partial(plain_attention, seen=seen, scale=0.5, softcap=softcap)
    with jax.enable_x64(True):
        exact = [jnp.asarray(x) for x in inputs()]
        assert exact[0].dtype == jnp.float64
        return jax.device_get(with_gradient(plain, exact))


PLAIN = 128, None, "padded"
# Several tiles, the last not full, and a single one. For older processors what adds up
# in tiles, with all that scores go through, and the single tile with nothing else.
TILED = [
    pytest.param(
        *(tile, window, softcap, arrangement),
        marks=[pytest.mark.numerics]
        * ((tile, window) == (4, 5) or (tile, window, arrangement) == PLAIN),
    )
    for tile in (4, 128)
    for window, softcap in ((None, None), (5, 2.0))
    for arrangement in SPANS
]


@pytest.mark.parametrize("tile, window, softcap, arrangement", TILED)
def test_attention_in_tiles_is_attention(tile, window, softcap, arrangement):
    spans = SPANS[arrangement]
    args = [jnp.asarray(x, jnp.float32) for x in inputs()]
    # As the decoder has it: a number of each layer, known when it runs.
    width = None if window is None else jnp.int32(window)

    def tiled(query, key, value):
        return attend(
            query,
            key,
            value,
            scale=0.5,
            softcap=softcap,
            window=width,
            spans=spans and KeySpans(*map(jnp.asarray, spans)),
            tile=tile,
        )

    got, grads = with_gradient(tiled, args)
    want, exact = truth(arrangement, window, softcap)
    # float32 rounding of a mean of at most 29 values of size 1.
    np.testing.assert_allclose(got, want, atol=3e-6)
    for a, b in zip(grads, exact, strict=True):
        assert relative(a, b) < 1e-5


def test_runs_of_a_row_see_what_the_whole_row_sees():
    """Two runs, whose last tiles are not full: with gradients, and no later keys."""
    starts, size = (7, 21), 7
    rows = np.concatenate([np.arange(x, x + size) for x in starts])
    query, key, value = (jnp.asarray(x, jnp.float32) for x in inputs())
    for name, window in (("padded", None), ("packed", None), ("shared", 5)):
        spans = SPANS[name] and KeySpans(*map(jnp.asarray, SPANS[name]))
        options = {"scale": 0.5, "softcap": 2.0, "window": window, "tile": 4}

        def whole(query, key, value, spans=spans, options=options):
            return attend(query, key, value, spans=spans, **options)[:, rows]

        def runs(query, key, value, spans=spans, options=options):
            own = spans and KeySpans(*(x[:, rows] for x in spans))
            where = {"spans": own, "starts": tuple(map(jnp.int32, starts))}
            return attend(query[:, rows], key, value, **where, **options)

        def with_gradient(function, *args):
            def scalar(*args):
                out = function(*args)
                return jnp.sum(jnp.sin(3 * out)), out

            return jax.jit(jax.grad(scalar, (0, 1, 2), has_aux=True))(*args)

        got = with_gradient(runs, query, key, value)
        want = with_gradient(whole, query, key, value)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert relative(a, b) < 1e-5
        # Later keys, some of them in the tile of a run's own, some in another run.
        out = jax.jit(runs)(query, key.at[:, 14:21].set(jnp.nan), value)
        assert np.isfinite(out[:, :size]).all() and np.isnan(out[:, size:]).any()
        out = jax.jit(runs)(query, key.at[:, 28:].set(jnp.nan), value)
        assert np.isfinite(out).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_few_digits_it_is_as_good_as_plain_attention(dtype):
    args = [jnp.asarray(x, dtype) for x in inputs()]
    options = {"scale": 0.5, "softcap": 2.0}
    seen = visible(SPANS["shared"], None)
    spans = KeySpans(*map(jnp.asarray, SPANS["shared"]))

    def error(out):
        return np.abs(np.asarray(out, np.float64) - np.asarray(truth)).max()

    with jax.enable_x64(True):
        exact = [jnp.asarray(x, jnp.float64) for x in args]
        truth = plain_attention(*exact, seen=seen, **options)
    plain = jax.jit(functools.partial(plain_attention, seen=seen, **options))(*args)
    tiled = functools.partial(attend, spans=spans, tile=8, **options)
    got = jax.jit(tiled)(*args)
    assert got.dtype == plain.dtype
    assert error(got) <= error(plain)


def test_hidden_keys_are_not_looked_at():
    """A NaN among keys of tiles that no query sees does not get out."""
    query, key, value = (jnp.asarray(x, jnp.float32) for x in inputs())
    spans = KeySpans(*map(jnp.asarray, spans_of([[(0, 12), (0, 17)]] * R)))
    hidden = key.at[:, 12:16].set(jnp.nan)
    for keys, rows, options in (
        (hidden, slice(0, 12), {}),  # later ones
        (hidden, slice(20, S), {"window": 3}),
        (key.at[:, :12].set(jnp.nan), slice(12, S), {"spans": spans}),
    ):
        tiled = functools.partial(attend, scale=0.5, tile=4, **options)
        out = jax.jit(tiled)(query, keys, value)
        assert np.isfinite(out[:, rows]).all()
        assert np.isnan(out).any()


def test_long_attention_compiles_to_little_memory():
    """The scores of one tile in the backward; never those of all keys."""
    shape = jax.ShapeDtypeStruct((4, 2048, 8, 16), jnp.bfloat16)

    def loss(query, key, value):
        return attend(query, key, value, scale=1.0).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    activations = 4 * 2048 * 8 * 16 * 4  # one of them in float32
    tile = 4 * 8 * 128 * 128 * 4
    assert memory.temp_size_in_bytes < 8 * activations + 6 * tile
    assert memory.temp_size_in_bytes < 4 * 8 * 2048 * 2048 * 4 / 4
