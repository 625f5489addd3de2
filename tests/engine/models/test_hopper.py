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
