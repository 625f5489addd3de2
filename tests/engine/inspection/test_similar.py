"""Pairs that repeat, nearly repeat or contradict each other."""

import numpy as np
import pytest

from engine.data.pair_tokens import PairTokens
from engine.inspection.similar import Match, Shared, Similar, digests, shared, similar

Row = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


def make_pairs(rows: list[Row]) -> PairTokens:
    sequences = [prompt + side for prompt, *sides in rows for side in sides]
    sizes = [len(sequence) for sequence in sequences]
    return PairTokens(
        tokens=np.concatenate(sequences).astype(np.int32),
        scored=np.ones(sum(sizes), np.bool_),
        offsets=np.cumsum([0, *sizes]),
        completion_start=np.repeat([len(row[0]) for row in rows], 2).astype(np.int32),
        rows=np.arange(len(rows)),
        weights=np.ones(len(rows), np.float32),
    )


def words(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(1000, size=count).tolist()


def random_rows(count: int, length: int = 60, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)

    def row() -> Row:
        return words(rng, length), words(rng, length), words(rng, length)

    return [row() for _ in range(count)]


def find(rows: list[Row]) -> Similar:
    pairs = make_pairs(rows)
    return similar(pairs, digests(pairs))


def changed(row: Row, *places: int) -> Row:
    """Another token at places of chosen."""
    prompt, chosen, rejected = row
    chosen = [2000 if i in places else token for i, token in enumerate(chosen)]
    return prompt, chosen, rejected


def test_pairs_of_nothing_in_common():
    none = Match(0)
    assert find(random_rows(50)) == Similar(none, none, none, 50)


def test_equal_pairs_are_those_after_the_first():
    rows = random_rows(8)
    found = find([*rows, rows[3], rows[5], rows[3]])
    assert found.equal == Match(3, 8, 3) and found.near == Match(0)
    assert found.prompts == 8


def test_the_same_pair_the_other_way_round():
    rows = random_rows(8)
    prompt, chosen, rejected = rows[2]
    assert find([*rows, (prompt, rejected, chosen)]).swapped == Match(1, 8, 2)
    assert find([(prompt, chosen, chosen)] * 2).swapped == Match(0)
    assert find([*rows, (prompt, rejected, rejected)]).swapped == Match(0)


def test_a_prompt_is_no_part_of_an_answer():
    """The boundary counts: the same tokens, split otherwise, are another pair."""
    (prompt, chosen, rejected), *_ = random_rows(1)
    other = (prompt + [7], chosen, rejected)
    assert find([(prompt, [7, *chosen], [7, *rejected]), other]).prompts == 2


@pytest.mark.parametrize("seed", range(5))
def test_nearly_equal_pairs(seed):
    """One changed token changes 5 of 168 shingles: 163 of 173 are common, 94 %."""
    rows = random_rows(40, seed=seed)
    found = find([*rows, changed(rows[11], 30)])
    assert found.near == Match(1, 40, 11) and found.equal == Match(0)


@pytest.mark.parametrize("seed", range(5))
def test_pairs_that_share_a_part_only(seed):
    """With another chosen answer 112 of 224 shingles are common: a half."""
    rows = random_rows(40, seed=seed)
    prompt, _, rejected = rows[11]
    other = (prompt, random_rows(1, seed=99)[0][1], rejected)
    assert find([*rows, other]).near == Match(0)


def test_what_all_prompts_begin_with_makes_nothing_alike():
    """A system message that is longer than all else."""
    system = words(np.random.default_rng(9), 2000)
    rows = [(system + p, c, r) for p, c, r in random_rows(40)]
    assert find(rows).near == Match(0)
    # Of a few pairs nothing tells a system message from what they have in common.
    assert find(rows[:4]).near.number == 3
    assert find([*rows, changed(rows[7], 3)]).near == Match(1, 40, 7)


def test_answers_of_a_word_need_equal_questions():
    rng = np.random.default_rng(0)
    rows = [(words(rng, 30), [5, 2], [6, 2]) for _ in range(100)]
    assert find(rows).near == Match(0)
    question = rows[4][0]
    assert find([*rows, ([*question[:-1], 7], [5, 2], [6, 2])]).near.number == 1


def test_more_tokens_than_are_looked_at_together(monkeypatch):
    rows = random_rows(40)
    rows += [changed(rows[11], 30), rows[0]]
    whole = find(rows)
    monkeypatch.setattr("engine.inspection.similar._CHUNK", 500)
    assert find(rows) == whole == Similar(Match(1, 41, 0), Match(0), whole.near, 40)
    assert whole.near == Match(1, 40, 11)


def test_what_an_evaluation_shares_with_the_training_data():
    train, other = random_rows(20), random_rows(5, seed=1)
    prompt, chosen, rejected = train[6]
    held_out = [*other, (prompt, rejected, chosen), train[9]]
    found = shared(*(digests(make_pairs(rows)) for rows in (train, held_out)))
    assert found == Shared(pairs=Match(1, 6, 9), prompts=Match(2, 5, 6))
