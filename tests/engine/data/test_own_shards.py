"""What each of several processes builds of a batch: its own shards, and no others."""

import numpy as np
import pytest

from engine.data.batches import BatchPlan, Order
from engine.data.layouts import Layout
from engine.data.pair_tokens import PairTokens

SHARDS = 8


def make_pairs(count: int) -> PairTokens:
    """Pair i is of tokens i alone, and of other lengths than its neighbours."""
    lengths = 3 + (np.arange(2 * count) * 7) % 5
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.repeat(np.arange(2 * count) // 2, lengths).astype(np.int32)
    scored = np.ones(len(tokens), bool)
    scored[offsets[:-1]] = False
    return PairTokens(
        tokens=tokens,
        scored=scored,
        offsets=offsets,
        completion_start=np.ones(2 * count, np.int32),
        rows=np.arange(count),
        weights=np.ones(count, np.float32),
    )


def plan(pairs: PairTokens, own: range | None) -> BatchPlan:
    order = Order(num_pairs=len(pairs), pairs_per_batch=32, shuffle=True, seed=3)
    return BatchPlan(order, Layout(pairs, 32, 2, SHARDS, own=own), 9)


def parts(processes: int) -> list[range]:
    size = SHARDS // processes
    return [range(i * size, (i + 1) * size) for i in range(processes)]


def rows_of(batches) -> list[list[int]]:
    """The pairs of each batch, by their rows, of which a padding pair has none."""
    found = []
    for built in zip(*batches, strict=True):
        whole = built[0][0]
        tokens = np.concatenate([batch.rows.tokens for batch, _ in built], axis=1)
        A, W, S = tokens.shape
        # A shard's chosen sequences come first.
        chosen = tokens.reshape(A, SHARDS, 2, -1, S)[:, :, 0, :, 0]
        real = whole.pairs.weights > 0
        found.append(chosen[real].tolist())
    return found


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_parts_of_all_are_the_batch_of_one(processes):
    pairs = make_pairs(100)
    whole = list(plan(pairs, None).batches())
    built = [list(plan(pairs, own).batches()) for own in parts(processes)]
    for step, (batch, tokens) in enumerate(whole):
        mine = [one[step][0] for one in built]
        assert {one[step][1] for one in built} == {tokens}
        for name in "tokens", "positions", "targets":
            pieces = [
                getattr(x.rows if name == "tokens" else x.scored, name) for x in mine
            ]
            want = getattr(batch.rows if name == "tokens" else batch.scored, name)
            assert pieces[0].shape[1] == want.shape[1] // processes
            np.testing.assert_array_equal(np.concatenate(pieces, axis=1), want)
        for x in mine:
            np.testing.assert_array_equal(x.scored.counts, batch.scored.counts)
            np.testing.assert_array_equal(x.pairs.weights, batch.pairs.weights)


@pytest.mark.parametrize("before", [1, 2, 8])
@pytest.mark.parametrize("after", [1, 4])
def test_no_row_is_lost_or_repeated_where_the_number_of_processes_changes(
    before, after
):
    pairs, step = make_pairs(100), 5  # amid the second epoch
    begun = [list(plan(pairs, own).batches())[:step] for own in parts(before)]
    rest = [list(plan(pairs, own).batches(step)) for own in parts(after)]
    batches = rows_of(begun) + rows_of(rest)
    assert batches == rows_of([list(plan(pairs, None).batches())])
    for epoch in range(2):
        seen = sum(batches[4 * epoch : 4 * epoch + 4], [])
        assert sorted(seen) == list(range(100))
