"""Attention by tokamax: what it is asked for is what the plain tiles give.

Its kernels themselves are compiled for H200s by `python -m bench.step.attention`, and
run on none here; another implementation of the same call computes these.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tokamax")

from tokamax._src.ops.attention.base import (  # pyright: ignore[reportMissingImports]
    DotProductAttention,
)

from engine.models.attention import hopper, tiles
from engine.parallel.batch import KeySpans
from tests.engine.models.test_attention import SPANS, H, K, N, R, S, visible
from tests.engine.tiny_models import relative

SHAPES = ((R, S, N, H), (R, S, K, H), (R, S, K, H))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_queries_see_from_one_key_on(rows, window):
    found = hopper.first_seen(S, window, SPANS[rows])
    seen = visible(SPANS[rows], window)
    if found is None:
        assert (rows, window) == ("padded", None)
        found = np.zeros((1, 1, 1), np.int32)
    index = np.arange(S)
    got = (index >= np.asarray(found)[:, 0, :, None]) & (index <= index[:, None])
    np.testing.assert_array_equal(np.broadcast_to(got, seen.shape), seen)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_it_is_attention(rows, window):
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.standard_normal(x), jnp.float32) for x in SHAPES]

    def gradient(attend):
        def scalar(query, key, value):
            given = {"spans": SPANS[rows], "softcap": 3.0, "window": window}
            out = attend(query, key, value, scale=0.3, **given)
            return jnp.sum(jnp.sin(3 * out)), out

        return jax.jit(jax.grad(scalar, (0, 1, 2), has_aux=True))(*args)

    plain = DotProductAttention()
    got = gradient(functools.partial(hopper.attend, op=plain, device=jax.devices()[0]))
    want = gradient(tiles.attend)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_queries_may_be_runs_of_a_row(rows, window):
    """Of 28 keys the second quarter and the last one."""
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal(x)[:, :28], jnp.float32) for x in SHAPES
    )
    own = np.r_[7:14, 21:28]
    spans = SPANS[rows] and KeySpans(*(jnp.asarray(x)[:, own] for x in SPANS[rows]))
    given = {"scale": 0.3, "window": window, "spans": spans, "starts": (7, 21)}
    ours = functools.partial(
        hopper.attend, op=DotProductAttention(), device=jax.devices()[0]
    )
    found = [
        jax.jit(functools.partial(attend, **given))(query[:, own], key, value)
        for attend in (ours, tiles.attend)
    ]
    assert relative(*found) < 1e-5
