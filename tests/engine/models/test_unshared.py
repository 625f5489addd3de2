"""Shared beginnings, laid out a second time: attention is what it was."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.models import attention
from engine.models.attention import splash, tiles
from engine.models.attention.unshared import Unshared
from engine.parallel.batch import Arrangement
from tests.engine.models.test_attention import SPANS, H, K, N, R, S, spans_of, visible
from tests.engine.tiny_models import relative

SHAPES = ((R, S, N, H), (R, S, K, H), (R, S, K, H))
MIXED = spans_of([[(4, 3, 5), (6, 2, 1)], [(0, 7, 2), (1, 1, 1), (8, 4, 5)], []])
ROWS = pytest.mark.parametrize("spans", [SPANS["shared"], MIXED, SPANS["packed"]])


@ROWS
def test_each_place_sees_what_its_token_sees(spans):
    rows = Unshared.of(spans, 2 * S)
    source, own, place, copy = (np.asarray(x) for x in rows[:4])
    starts = np.asarray(rows.spans.begin)
    seen = visible(spans, None)
    twice = np.zeros((R, S), bool)
    for r, i in np.ndindex(R, S):
        x = place[r, i]
        assert own[r, x] and source[r, x] == i
        keys = source[r, starts[r, x] : x + 1]
        np.testing.assert_array_equal(keys, np.flatnonzero(seen[r, i]))
        first, shared_end, begin = (int(one[r, i]) for one in spans)
        if begin != shared_end:
            twice[r, first:shared_end] = True
    assert own.sum() == R * S
    np.testing.assert_array_equal(copy >= 0, twice)
    for r, i in np.argwhere(twice):
        assert source[r, copy[r, i]] == i and not own[r, copy[r, i]]
    # What is behind the last token sees itself alone, and nobody sees it.
    for r in range(R):
        behind = np.arange(place[r, -1] + 1, 2 * S)
        np.testing.assert_array_equal(starts[r, behind], behind)
        assert not own[r, behind].any()


def check(attend, kernel, spans, shapes, length, **options):
    """Values and gradients of a kernel over longer rows are the plain tiles'."""
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.standard_normal(x), jnp.float32) for x in shapes]

    def gradient(attend):
        def scalar(query, key, value, spans):
            out = attend(query, key, value, spans)
            return jnp.sum(jnp.sin(3 * out)), out

        return jax.jit(jax.grad(scalar, (0, 1, 2), has_aux=True))(*args, spans)

    def unshared(query, key, value, spans):
        rows = Unshared.of(spans, length)
        call = functools.partial(kernel, scale=0.3, spans=rows.spans, **options)
        return rows.attend(call, query, key, value)

    def plain(query, key, value, spans):
        return attend(query, key, value, scale=0.3, spans=spans, **options)

    got, want = gradient(unshared), gradient(plain)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(a, b) < 1e-5


@ROWS
@pytest.mark.parametrize("window", [None, 5])
def test_it_is_attention(spans, window):
    plain = functools.partial(tiles.attend, tile=8)
    check(plain, plain, spans, SHAPES, 2 * S, window=window, softcap=3.0)


def test_by_a_tpus_kernel():
    """With rows of more than one block."""
    spans = spans_of([[(90, 50, 40), (30, 9, 11)]], rows=1, length=230)
    kernel = functools.partial(splash.attend, interpret=True)
    shapes = ((1, 230, N, 64), (1, 230, K, 64), (1, 230, K, 64))
    check(tiles.attend, kernel, spans, shapes, 460, window=100)


def test_a_layers_window_and_its_rows_reach_the_kernel(monkeypatch):
    kernel = functools.partial(splash.attend, interpret=True)
    monkeypatch.setattr(splash, "attend", kernel)
    arrangement = Arrangement(packing=True, share_prompt=True, longest=20)
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.standard_normal(x), jnp.float32) for x in SHAPES]

    @functools.partial(jax.jit, static_argnums=0)
    def attended(name, which, *args):
        return attention.attend(
            name,
            *args,
            scale=0.3,
            softcap=2.0,
            windows=(None, 6),
            which=which,
            spans=attention.laid_out(name, MIXED, arrangement),
            longest=arrangement.longest,
        )

    for which in (0, 1):
        got, want = (attended(x, jnp.int32(which), *args) for x in ("splash", "tiles"))
        assert relative(got, want) < 1e-5
