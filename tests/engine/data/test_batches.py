import threading
import time

import numpy as np
import pytest

from engine.data.batches import Batch, BatchPlan, assemble, choose_buckets, prefetch
from engine.data.tokenization import PairTokens
from engine.errors import InputError


def make_pairs(number: int, seed: int = 0, longest: int = 60) -> PairTokens:
    """Pairs whose token ids are all different, so that no mix-up goes unseen."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, longest + 1, 2 * number)
    return PairTokens(
        tokens=np.arange(1, lengths.sum() + 1, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        score_start=rng.integers(1, lengths).astype(np.int32),
        rows=np.arange(number),
        dropped=0,
    )


def expected_batch(pairs, members, length, capacity, shards):
    """The contract, said once more, one number at a time."""
    A, B = members.shape
    Bl = B // shards
    tokens = np.zeros((A, 2, B, length), int)
    positions = np.zeros((A, shards, capacity), int)
    targets = np.zeros((A, shards, capacity), int)
    num_scored = np.zeros((A, shards, 2 * Bl), int)
    for a, n, side, b in np.ndindex(A, shards, 2, Bl):
        pair = members[a, n * Bl + b]
        if pair < 0:
            continue
        i = 2 * pair + side
        row = pairs.tokens[pairs.offsets[i] : pairs.offsets[i + 1]]
        tokens[a, side, n * Bl + b, : len(row)] = row
        for t in range(pairs.score_start[i], len(row)):
            k = num_scored[a, n].sum()
            positions[a, n, k] = (side * Bl + b) * length + t - 1
            targets[a, n, k] = row[t]
            num_scored[a, n, side * Bl + b] += 1
    weights = (members >= 0).astype(float)
    return Batch(tokens, positions, targets, num_scored, weights)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("fillers", [0, 3, 7])
def test_assemble_is_the_contract(shards, fillers):
    pairs = make_pairs(30)
    members = np.random.default_rng(1).permutation(30)[:8]
    members[8 - fillers :] = -1
    members = members.reshape(2, 4)
    batch, num_tokens = assemble(pairs, members, 64, 512, shards)
    expected = expected_batch(pairs, members, 64, 512, shards)
    for name, got, want in zip(Batch._fields, batch, expected, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=name)
        assert got.dtype == (np.float32 if name == "weights" else np.int32)
    assert num_tokens == (batch.tokens > 0).sum()


def test_positions_are_those_of_the_token_before_the_target():
    pairs = make_pairs(12)
    plan = BatchPlan(pairs, pairs_per_batch=12, accumulation=2, shards=3)
    batch, _ = plan.batch(0, 0)
    A, _, B, S = batch.tokens.shape
    for a in range(A):
        for n in range(3):
            local = batch.tokens[a, :, n * 2 : n * 2 + 2].reshape(-1)
            sequences = np.repeat(np.arange(4), batch.num_scored[a, n])
            count = len(sequences)
            positions = batch.positions[a, n, :count]
            np.testing.assert_array_equal(
                local[positions + 1], batch.targets[a, n, :count]
            )
            np.testing.assert_array_equal(positions // S, sequences)


def pairs_seen(batches) -> list[int]:
    """Each real pair, known by the first token of its chosen side."""
    return [
        int(first)
        for batch, _ in batches
        for first in batch.tokens[:, 0, :, 0].ravel()
        if first
    ]


def firsts(pairs) -> list[int]:
    return pairs.tokens[pairs.offsets[:-1:2]].tolist()


def test_file_order_without_shuffling():
    pairs = make_pairs(10)
    plan = BatchPlan(pairs, pairs_per_batch=4, accumulation=2)
    for epoch in (0, 1):
        assert pairs_seen(plan.batches(epoch)) == firsts(pairs)
    batches = list(plan.batches(0))
    assert len(batches) == plan.batches_per_epoch == 3
    np.testing.assert_array_equal(batches[2][0].weights, [[1, 1], [0, 0]])
    assert not batches[2][0].num_scored[1].any()
    assert sum(tokens for _, tokens in batches) == len(pairs.tokens)


def test_drop_last():
    pairs = make_pairs(10)
    plan = BatchPlan(pairs, pairs_per_batch=4, drop_last=True)
    assert pairs_seen(plan.batches(0)) == firsts(pairs)[:8]
    assert plan.batches_per_epoch == 2
    assert BatchPlan(pairs, pairs_per_batch=5, drop_last=True).batches_per_epoch == 2
    with pytest.raises(InputError, match="10 pairs do not fill one batch of 11, and"):
        BatchPlan(pairs, pairs_per_batch=11, drop_last=True)
    assert BatchPlan(pairs, pairs_per_batch=11).batches_per_epoch == 1


def test_each_epoch_has_its_own_seeded_order():
    pairs = make_pairs(50)
    options = {"pairs_per_batch": 8, "shuffle": True}
    plan = BatchPlan(pairs, seed=3, **options)
    orders = [pairs_seen(plan.batches(epoch)) for epoch in (0, 1)]
    assert all(sorted(order) == firsts(pairs) for order in orders)
    assert orders[0] != orders[1] and orders[0] != firsts(pairs)
    again = BatchPlan(pairs, seed=3, **options)
    assert pairs_seen(again.batches(1)) == orders[1]
    assert pairs_seen(BatchPlan(pairs, seed=4, **options).batches(0)) != orders[0]


def test_any_batch_can_be_had_alone():
    plan = BatchPlan(make_pairs(50), pairs_per_batch=8, shuffle=True, seed=3)
    batches = list(plan.batches(2))
    for index in (0, 4, 6):
        for (got, tokens), (want, number) in (
            (plan.batch(2, index), batches[index]),
            (next(plan.batches(2, first=index)), batches[index]),
        ):
            assert tokens == number
            for x, y in zip(got, want, strict=True):
                np.testing.assert_array_equal(x, y)
    assert list(plan.batches(2, first=7)) == []
    with pytest.raises(IndexError, match="must be at least 0 and below 7"):
        plan.batch(2, 7)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch, shards", [(2, 1), (8, 2), (8, 8), (64, 2)])
def test_few_shapes_fit_every_epoch(shuffle, batch, shards):
    pairs = make_pairs(300, longest=500)
    plan = BatchPlan(pairs, pairs_per_batch=batch, shards=shards, shuffle=shuffle)
    assert 1 <= len({s for s, _ in plan.shapes}) <= 4
    assert all(s % 8 == 0 and t % 128 == 0 for s, t in plan.shapes)
    assert max(s for s, _ in plan.shapes) == 504
    used = set()
    for epoch in range(2):
        for built, _ in plan.batches(epoch):
            used.add((built.tokens.shape[-1], built.targets.shape[-1]))
            scored = built.num_scored.sum(axis=-1)
            assert scored.max() <= built.targets.shape[-1]
    assert used <= set(plan.shapes) and len(used) <= 4


def test_the_unlikely_capacity_is_taken_when_it_is_needed():
    pairs = make_pairs(4000, longest=500)
    plan = BatchPlan(pairs, pairs_per_batch=32, shuffle=True)
    (likely, most) = (t for s, t in plan.shapes if s == 504)
    assert likely < 0.8 * most
    largest = np.argsort(pairs.num_scored.reshape(-1, 2).sum(axis=1))[-32:]
    plan.order = lambda epoch: largest  # pyright: ignore[reportAttributeAccessIssue]
    batch, _ = plan.batch(0, 0)
    scored = batch.num_scored.sum(axis=-1)
    assert batch.targets.shape[-1] == most >= scored.max() > most - 128


def test_capacities_are_exact_where_the_batches_are_known():
    pairs = make_pairs(64, longest=100)
    plan = BatchPlan(pairs, pairs_per_batch=16, shards=2)
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


@pytest.mark.parametrize(
    "kw", [{"pairs_per_batch": 6, "shards": 4}, {"accumulation": 3}]
)
def test_a_batch_that_cannot_be_split(kw):
    with pytest.raises(InputError, match="cannot be split over .* make it a multiple"):
        BatchPlan(make_pairs(8), **{"pairs_per_batch": 8, **kw})


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
