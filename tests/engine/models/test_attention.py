import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.models.attention import tiles as attention
from engine.models.attention.tiles import attend
from tests.engine.tiny_models import relative


def plain_attention(query, key, value, scale, softcap, window):
    """float64, one loop a query."""
    out = np.zeros(query.shape)
    group = query.shape[2] // key.shape[2]
    for r, s, n in np.ndindex(*query.shape[:3]):
        first = 0 if window is None else max(0, s - window + 1)
        keys, values = (x[r, first : s + 1, n // group] for x in (key, value))
        scores = scale * keys @ query[r, s, n]
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[r, s, n] = weights / weights.sum() @ values
    return out


def whole_attention(query, key, value, scale, softcap, window):
    """The same with all scores at once, so that JAX can differentiate it."""
    R, S, N, H = query.shape
    grouped = query.reshape(R, S, key.shape[2], -1, H)
    scores = scale * jnp.einsum("RQKGH,RSKH->RKGQS", grouped, key)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    q, k = np.arange(S)[:, None], np.arange(S)[None]
    visible = (k <= q) & (window is None or q - k < window)
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("RKGQS,RSKH->RQKGH", weights, value).reshape(R, S, N, H)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    "score_bytes",
    [
        10**9,  # everything at once
        7 * 4 * 13 * 4 * 6,  # 7 queries of all rows, which 13 is no multiple of
        4 * 13 * 4,  # one query of one row
    ],
)
def test_attention_in_tiles_is_attention(score_bytes, window):
    rng = np.random.default_rng(0)
    query = rng.standard_normal((6, 13, 4, 8))
    key, value = rng.standard_normal((2, 6, 13, 2, 8))
    options = {"scale": 0.5, "softcap": 2.0, "window": window}

    def tiled(*args):
        return attend(*args, score_bytes=score_bytes, **options)

    args = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    got = jax.jit(tiled)(*args)
    want = plain_attention(query, key, value, **options)
    # float32 rounding of a mean of 13 values of size 1.
    np.testing.assert_allclose(got, want, atol=3e-6)

    def scalar(function):
        return lambda *args: jnp.sum(jnp.sin(3 * function(*args)))

    grads = jax.jit(jax.grad(scalar(tiled), (0, 1, 2)))(*args)
    with jax.enable_x64(True):
        exact = [jnp.asarray(x) for x in (query, key, value)]
        assert exact[0].dtype == jnp.float64
        whole = functools.partial(whole_attention, **options)
        truth = jax.jit(jax.grad(scalar(whole), (0, 1, 2)))(*exact)
        np.testing.assert_allclose(whole(*exact), want, atol=1e-12)
    for a, b in zip(grads, truth, strict=True):
        assert relative(a, b) < 1e-5


def test_tiles_keep_the_scores_within_their_budget():
    for rows, length, heads, budget in [(64, 8192, 32, 2**27), (6, 100, 4, 2**20)]:
        row_tile, query_tile = attention._tiles(rows, length, heads, budget)
        assert rows % row_tile == 0
        assert row_tile * query_tile * heads * length * 4 <= budget


def test_long_attention_compiles_to_little_memory():
    """A few tiles of scores in the backward, whatever the budget; never all scores."""
    shape = jax.ShapeDtypeStruct((4, 2048, 8, 16), jnp.bfloat16)
    all_scores = 4 * 8 * 2048 * 2048 * 4
    budget = all_scores // 16

    def loss(query, key, value):
        out = attend(query, key, value, scale=1.0, score_bytes=budget)
        return out.astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    # Scores, their exponentials and the gradients of both: seen 3.6 of them.
    assert memory.temp_size_in_bytes < 4 * budget
