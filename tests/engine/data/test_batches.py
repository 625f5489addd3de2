import threading
import time

import jax
import numpy as np
import pytest

from engine.data.assembly import assemble, check_distinct
from engine.data.batches import BatchPlan, Order, prefetch
from engine.data.layouts import Layout
from engine.data.shapes import choose_buckets
from engine.data.tokenization import PairTokens
from engine.errors import InputError
from engine.parallel.batch import Batch, ModelRows, Pairs, ScoredTokens


def make_pairs(number: int, seed: int = 0, longest: int = 60) -> PairTokens:
    """Pairs whose token ids are all different, so that no mix-up goes unseen."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, 2 * number)
    starts = rng.integers(1, lengths).astype(np.int32)
    scored = []
    for length, start in zip(lengths, starts, strict=True):
        # Somewhere in the completion, with gaps: at least one token.
        marks = (np.arange(length) >= start) & (rng.random(length) < 0.7)
        marks[rng.integers(start, length)] = True
        scored.append(marks)
    return PairTokens(
        tokens=np.arange(1, lengths.sum() + 1, dtype=np.int32),
        scored=np.concatenate(scored),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        completion_start=starts,
        rows=np.arange(number),
        weights=rng.uniform(0.5, 3, number).astype(np.float32),
    )


def plan_of(pairs, size, *, steps=None, accumulation=1, shards=1, **order) -> BatchPlan:
    order = Order(num_pairs=len(pairs), pairs_per_batch=size, **order)
    return BatchPlan(order, Layout(pairs, size, accumulation, shards), steps)


def expected_batch(pairs, members, shape):
    """The contract, said once more, one number at a time."""
    (A, N, P), (S, T) = members.shape, shape
    tokens = np.zeros((A, N * 2 * P, S), int)
    positions = np.zeros((A, N, T), int)
    targets = np.zeros((A, N, T), int)
    counts = np.zeros((A, N, 2 * P), int)
    weights = np.zeros((A, N, P))
    for a, n, side, p in np.ndindex(A, N, 2, P):
        pair = members[a, n, p]
        if pair < 0:
            continue
        i, q = 2 * pair + side, side * P + p
        weights[a, n, p] = pairs.weights[pair]
        sequence = pairs.tokens[pairs.offsets[i] : pairs.offsets[i + 1]]
        scored = pairs.scored[pairs.offsets[i] : pairs.offsets[i + 1]]
        tokens[a, n * 2 * P + q, : len(sequence)] = sequence
        for t in np.flatnonzero(scored):
            k = counts[a, n].sum()
            positions[a, n, k] = q * S + t - 1
            targets[a, n, k] = sequence[t]
            counts[a, n, q] += 1
    return Batch(
        ModelRows(tokens),
        ScoredTokens(positions, targets, counts),
        Pairs(weights),
    )


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("padding", [0, 3, 7])
def test_assemble_is_the_contract(shards, padding):
    pairs = make_pairs(30)
    members = np.random.default_rng(1).permutation(30)[:8]
    members[8 - padding :] = -1
    members = members.reshape(2, shards, 4 // shards)
    batch, num_tokens = assemble(pairs, members, (64, 512))
    expected = expected_batch(pairs, members, (64, 512))
    for got, want in zip(
        jax.tree.leaves(batch), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == (np.float32 if want.dtype == float else np.int32)
    assert num_tokens == (batch.rows.tokens > 0).sum()


def test_positions_are_those_of_the_token_before_the_target():
    pairs = make_pairs(12)
    batch, _ = next(plan_of(pairs, 12, accumulation=2, shards=3).batches())
    A, W, S = batch.rows.tokens.shape
    assert W == 12
    for a in range(A):
        for n in range(3):
            local = batch.rows.tokens[a, n * 4 : n * 4 + 4].reshape(-1)
            sequences = np.repeat(np.arange(4), batch.scored.counts[a, n])
            count = len(sequences)
            positions = batch.scored.positions[a, n, :count]
            np.testing.assert_array_equal(
                local[positions + 1], batch.scored.targets[a, n, :count]
            )
            np.testing.assert_array_equal(positions // S, sequences)


def test_a_state_that_is_scored_twice_is_refused():
    """The gradient of the gather takes one of the two; nothing may rely on more."""
    batch, _ = next(plan_of(make_pairs(4), 4).batches())
    check_distinct(batch.scored)
    batch.scored.positions[0, 0, 1] = batch.scored.positions[0, 0, 0]
    with pytest.raises(AssertionError, match="scored twice"):
        check_distinct(batch.scored)


def pairs_seen(plan, batches) -> list[int]:
    """Each real pair, known by the first token of its chosen side."""
    _, N, P = plan.layout.grid
    return [
        int(first)
        for batch, _ in batches
        for first in batch.rows.tokens.reshape(-1, N, 2, P, batch.shape[0])[
            :, :, 0, :, 0
        ].ravel()
        if first
    ]


def firsts(pairs) -> list[int]:
    return pairs.tokens[pairs.offsets[:-1:2]].tolist()


def test_file_order_without_shuffling():
    pairs = make_pairs(10)
    plan = plan_of(pairs, 4, accumulation=2, steps=6)
    batches = list(plan.batches())
    assert len(batches) == 6 and plan.order.batches_per_epoch == 3
    assert pairs_seen(plan, batches) == 2 * firsts(pairs)
    last = batches[2][0]
    np.testing.assert_array_equal(last.pairs.weights[:, 0] > 0, [[1, 1], [0, 0]])
    assert not last.scored.counts[1].any()
    assert sum(tokens for _, tokens in batches) == 2 * len(pairs.tokens)


def test_drop_last():
    pairs = make_pairs(10)
    plan = plan_of(pairs, 4, drop_last=True)
    assert pairs_seen(plan, plan.batches()) == firsts(pairs)[:8]
    assert plan.order.batches_per_epoch == 2
    assert plan_of(pairs, 5, drop_last=True).order.batches_per_epoch == 2
    with pytest.raises(InputError, match="10 pairs do not fill one batch of 11, and"):
        plan_of(pairs, 11, drop_last=True)
    assert plan_of(pairs, 11).order.batches_per_epoch == 1


def test_each_epoch_has_its_own_seeded_order():
    pairs = make_pairs(50)
    plan = plan_of(pairs, 8, shuffle=True, seed=3, steps=14)
    seen = pairs_seen(plan, plan.batches())
    orders = seen[:50], seen[50:]
    assert all(sorted(order) == firsts(pairs) for order in orders)
    assert orders[0] != orders[1] and orders[0] != firsts(pairs)
    again = plan_of(pairs, 8, shuffle=True, seed=3, steps=14)
    assert pairs_seen(again, again.batches(7)) == orders[1]
    other = plan_of(pairs, 8, shuffle=True, seed=4)
    assert pairs_seen(other, other.batches()) != orders[0]


def test_a_run_can_begin_at_any_batch():
    plan = plan_of(make_pairs(50), 8, shuffle=True, seed=3, steps=17)
    batches = list(plan.batches())
    assert len(batches) == 17
    for first in (0, 4, 7, 16):
        got, tokens = next(plan.batches(first))
        want, number = batches[first]
        assert tokens == number
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(x, y)
    assert list(plan.batches(17)) == []


def test_epochs_count_microbatches():
    """Ten pairs, four a batch, two a microbatch: five microbatches an epoch."""
    plan = plan_of(make_pairs(10), 4, accumulation=2, steps=6)
    assert [plan.epochs_done(step, 2) for step in range(1, 7)] == [
        *(0.4, 0.8, 1.0),
        *(1.4, 1.8, 2.0),
    ]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch, shards", [(2, 1), (8, 2), (8, 8), (64, 2)])
def test_few_shapes_fit_the_run_and_each_is_met(shuffle, batch, shards):
    """Each is compiled before the first step: one that never comes would be wasted."""
    pairs = make_pairs(300, longest=500)
    steps = 2 * -(-300 // batch)
    plan = plan_of(pairs, batch, shards=shards, shuffle=shuffle, steps=steps)
    assert 1 <= len(plan.shapes) <= 4
    assert all(s % 8 == 0 and t % 128 == 0 for s, t in plan.shapes)
    assert max(s for s, _ in plan.shapes) == 504
    met = set()
    for built, _ in plan.batches():
        met.add(built.shape)
        assert built.scored.counts.sum(axis=-1).max() <= built.shape[1]
    assert met == set(plan.shapes)


def test_a_run_that_ends_early_has_only_its_own_shapes():
    pairs = make_pairs(300, longest=500)
    whole, begun = (plan_of(pairs, 4, shuffle=True, steps=steps) for steps in (None, 2))
    met = {batch.shape for batch, _ in begun.batches()}
    assert met == set(begun.shapes) and max(met) <= max(whole.shapes)


def test_very_many_epochs_are_planned_at_once():
    pairs = make_pairs(20, longest=100)
    plan = plan_of(pairs, 4, shuffle=True, steps=5 * 2**31)
    largest = np.sort(pairs.num_scored.reshape(-1, 2).sum(axis=1))[-4:].sum()
    assert plan.shapes[-1] == (104, -(-largest // 128) * 128)
    assert next(plan.batches(5 * 2**30))[0].shape in plan.shapes


def test_capacities_are_exact():
    pairs = make_pairs(64, longest=100)
    plan = plan_of(pairs, 16, shards=2)
    scored = pairs.num_scored.reshape(-1, 16).sum(axis=1).max()
    assert max(t for _, t in plan.shapes) == -(-scored // 128) * 128


def test_buckets_minimise_the_expected_length():
    lengths = np.array([8, 16, 64, 72, 512])
    chance = np.array([0.3, 0.2, 0.2, 0.2, 0.1])
    below = np.cumsum(chance)

    def cost(buckets):
        return sum(
            p * min(b for b in buckets if b >= s)
            for s, p in zip(lengths, chance, strict=True)
        )

    chosen = choose_buckets(lengths, below)
    others = [[8, 16, 72, 512], [16, 64, 72, 512], [8, 64, 72, 512], [16, 72, 512]]
    assert chosen in ([16, 72, 512], [8, 16, 72, 512])
    assert cost(chosen) <= 1.05 * min(map(cost, others))
    # One more is not worth a compilation where it saves next to nothing.
    assert choose_buckets(np.array([500, 512]), np.array([0.5, 1.0])) == [512]
    assert choose_buckets(np.array([8]), np.array([1.0])) == [8]
    assert choose_buckets(np.array([8, 512]), np.array([0.5, 1.0])) == [8, 512]


@pytest.mark.parametrize("size, kw", [(6, {"shards": 4}), (8, {"accumulation": 3})])
def test_a_batch_that_cannot_be_split(size, kw):
    with pytest.raises(InputError, match="cannot be split over .* make it a multiple"):
        plan_of(make_pairs(8), size, **kw)


# ---------------------------------------------------------------- prefetch


def prefetch_threads() -> int:
    return sum(t.name.startswith("prefetch") for t in threading.enumerate())


def test_prefetch_gives_the_same_items_and_works_ahead():
    made = []

    def items():
        for i in range(6):
            made.append(i)
            yield i

    ahead = prefetch(items())
    assert next(ahead) == 0
    for _ in range(500):  # up to 5 s: two more items are made without being asked for
        if made == [0, 1, 2]:
            break
        time.sleep(0.01)
    assert made == [0, 1, 2]
    assert list(ahead) == [1, 2, 3, 4, 5] and made == list(range(6))
    assert prefetch_threads() == 0


def test_prefetch_raises_where_the_item_is_taken():
    def items():
        yield 1
        raise InputError("bad row")

    ahead = prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(InputError, match="bad row"):
        next(ahead)
    assert prefetch_threads() == 0


def test_prefetch_ends_its_thread_when_it_is_left():
    ahead = prefetch(iter(range(100)))
    assert next(ahead) == 0 and prefetch_threads() == 1
    ahead.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert prefetch_threads() == 0


def test_prefetch_of_nothing():
    assert list(prefetch(iter([]))) == []
