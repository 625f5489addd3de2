"""Where sequences lie in rows, whatever the arrangement."""

import dataclasses

import numpy as np
import pytest

from engine.data.assembly import assemble, shared_lengths
from engine.data.layouts import Layout
from engine.data.pair_tokens import Limits
from engine.data.shapes import stream_shapes
from engine.parallel.batch import Arrangement, KeySpans
from tests.engine.training.step_runs import prompted_pairs

ARRANGEMENTS = [
    Arrangement(packing=packing, share_prompt=share)
    for packing in (False, True)
    for share in (False, True)
]
named = pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)


def seen_by(spans, tokens, row: int, index: int) -> list[int]:
    """The tokens that one of them sees, itself the last."""
    if spans is None:
        return tokens[row, : index + 1].tolist()
    first, shared_end, begin = (int(x[row, index]) for x in spans)
    keys = [*range(first, shared_end), *range(begin, index + 1)]
    assert len(keys) == int(spans.positions[row, index]) + 1
    return tokens[row, keys].tolist()


@named
@pytest.mark.parametrize("shards", [1, 4])
def test_a_scored_state_has_seen_its_sequence_and_nothing_else(arrangement, shards):
    pairs = prompted_pairs(20)
    members = np.random.default_rng(1).permutation(20)[:16]
    members[13:] = -1
    layout = Layout(pairs, 16, 2, shards, arrangement=arrangement)
    longest, most = (int(x[0]) for x in layout.needs(members[None]))
    batch, num_tokens = layout.build(members, ((longest, most),))
    A, N, P = layout.grid
    W = arrangement.rows(P)
    assert batch.rows.tokens.shape == (A, N * W, longest)
    total = 0
    for a, n, q in np.ndindex(A, N, 2 * P):
        pair = members.reshape(layout.grid)[a, n, q % P]
        count = batch.scored.counts[a, n, q]
        if pair < 0:
            assert count == 0
            continue
        i = 2 * pair + q // P
        sequence = pairs.tokens[pairs.offsets[i] : pairs.offsets[i + 1]].tolist()
        scored = pairs.scored[pairs.offsets[i] : pairs.offsets[i + 1]]
        total += len(sequence)
        assert count == scored.sum()
        before = int(batch.scored.counts[a, n, :q].sum())
        for k, t in enumerate(np.flatnonzero(scored), start=before):
            row, index = divmod(int(batch.scored.positions[a, n, k]), longest)
            spans = batch.rows.spans
            if spans is not None:
                spans = KeySpans(*(np.asarray(x)[a] for x in spans))
            found = seen_by(spans, batch.rows.tokens[a], n * W + row, index)
            assert found == sequence[:t]
            assert batch.scored.targets[a, n, k] == sequence[t]
    assert num_tokens == total


@named
def test_the_rows_are_as_long_as_they_need_to_be(arrangement):
    """And the tokens are there once."""
    pairs = prompted_pairs(8)
    pairs = dataclasses.replace(pairs, tokens=pairs.tokens + 1)
    layout = Layout(pairs, 8, 1, 2, arrangement=arrangement)
    members = np.arange(8)
    longest, most = (int(x[0]) for x in layout.needs(members[None]))
    with pytest.raises(AssertionError):
        assemble(
            pairs,
            members.reshape(layout.grid),
            (longest - 1, most),
            arrangement=arrangement,
        )
    batch, _ = layout.build(members, ((longest + 5, most),))
    tokens, shared = pairs.lengths.sum(), shared_lengths(pairs).sum()
    if arrangement.share_prompt:
        assert shared > 0
        tokens -= shared
    assert (batch.rows.tokens > 0).sum() == layout.tokens.sum() == tokens


def test_what_a_pair_shares_ends_before_the_state_that_is_scored_first():
    pairs = prompted_pairs(200)
    shared = shared_lengths(pairs)
    for p in range(200):
        sides = [
            slice(pairs.offsets[i], pairs.offsets[i + 1]) for i in (2 * p, 2 * p + 1)
        ]
        most = min(int(np.argmax(pairs.scored[x])) for x in sides) - 1
        chosen, rejected = (pairs.tokens[x][:most].tolist() for x in sides)
        alike = [a == b for a, b in zip(chosen, rejected, strict=True)]
        assert shared[p] == (alike.index(False) if False in alike else most)
    assert (shared == 0).any() and (shared > 8).any()


def test_many_pairs_are_compared_a_part_at_a_time(monkeypatch):
    pairs = prompted_pairs(50)
    want = shared_lengths(pairs)
    monkeypatch.setattr("engine.data.assembly._PAIRS_AT_ONCE", 7)
    np.testing.assert_array_equal(shared_lengths(pairs), want)


@named
def test_whatever_a_stream_brings_fits_its_last_shape(arrangement):
    limits = Limits(None, None, 22, "keep_start")
    pairs = prompted_pairs(64)
    assert pairs.lengths.max() <= 22
    layout = Layout(pairs, 64, 2, 4, arrangement=arrangement)
    longest, most = layout.needs(np.arange(64)[None])
    (length, capacity) = stream_shapes(limits, layout.grid[2], arrangement)[-1]
    assert longest[0] <= length and most[0] <= capacity
