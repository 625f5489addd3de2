"""Which elements are dropped follows from what they are, and from nothing else."""

import jax
import jax.numpy as jnp
import numpy as np

from engine.models.dropout import Dropout, prefix_hashes, step_key
from engine.parallel.batch import KeySpans
from tests.engine.tiny_models import random_tokens

RATE = 0.25
W, S, SIZE = 16, 64, 96


def masks(
    tokens, *, step=3, layer=1, module="q", first=0, size=SIZE, seed=0, spans=None
):
    key = jax.random.fold_in(step_key(seed, jnp.int32(step)), layer)
    dropout = Dropout(
        rate=RATE, key=key, prefixes=prefix_hashes(jnp.asarray(tokens), spans)
    )
    ones = jnp.ones((*tokens.shape, size), jnp.bfloat16)
    return np.asarray(dropout(ones, module, first).astype(jnp.float32))


TOKENS = random_tokens(W, S, seed=3) + 1


def test_the_rate_and_the_scale():
    dropped = masks(TOKENS)
    assert set(np.unique(dropped)) == {0.0, float(jnp.bfloat16(1 / (1 - RATE)))}
    kept = dropped > 0
    # Six standard deviations of a mean over so many independent elements.
    for axis in (None, (0, 1), (0, 2), (1, 2)):
        share = kept.mean(axis)
        bound = 6 * np.sqrt(RATE * (1 - RATE) / (kept.size / np.size(share)))
        assert np.abs(share - (1 - RATE)).max() < bound


def test_neighbours_and_others_are_independent():
    kept = masks(TOKENS) > 0
    others = [
        masks(TOKENS, step=4),
        masks(TOKENS, layer=2),
        masks(TOKENS, module="k"),
        masks(TOKENS, seed=1),
        np.roll(masks(TOKENS), 1, axis=0),
        np.roll(masks(TOKENS), 1, axis=1),
        np.roll(masks(TOKENS), 1, axis=2),
    ]
    bound = 6 / np.sqrt(kept.size)
    for other in others:
        correlation = np.corrcoef(kept.ravel(), other.ravel() > 0)[0, 1]
        assert abs(correlation) < bound


def test_place_padding_and_shards_do_not_matter():
    want = masks(TOKENS)
    order = np.random.default_rng(0).permutation(W)
    np.testing.assert_array_equal(masks(TOKENS[order]), want[order])
    padded = np.pad(TOKENS, ((0, 0), (0, 10)))
    np.testing.assert_array_equal(masks(padded)[:, :S], want)
    parts = [masks(TOKENS, first=f, size=SIZE // 4) for f in range(0, SIZE, SIZE // 4)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), want)


def test_the_arrangement_of_rows_does_not_matter():
    """Two sequences that begin alike, in rows of their own or behind one beginning."""
    one, other = TOKENS[0, :40], np.append(TOKENS[0, :24], TOKENS[1, 24:30])
    rows = np.zeros((2, 40), np.int32)
    rows[0], rows[1, :30] = one, other
    want = masks(rows)
    np.testing.assert_array_equal(want[0, :24], want[1, :24])
    assert (want[0, 24:30] != want[1, 24:30]).any()
    before = 5  # tokens of another sequence in front
    row = np.concatenate([TOKENS[2, :before], one, other[24:]])[None]
    index = np.arange(row.size)
    own = index >= before
    first = np.where(own, before, 0)[None].astype(np.int32)
    branch = index >= before + 24
    shared_end = np.where(branch, before + 24, first).astype(np.int32)
    begin = np.select(
        [index >= before + 40, branch, own], [before + 40, before + 24, before]
    )
    spans = KeySpans(first, shared_end, begin[None].astype(np.int32))
    got = masks(row, spans=KeySpans(*map(jnp.asarray, spans)))[0, before:]
    np.testing.assert_array_equal(got[:40], want[0])
    np.testing.assert_array_equal(got[40:], want[1, 24:30])
