"""The numbers of a data set, each counted by hand."""

import numpy as np
import pytest

from engine.data.batches import BatchPlan, Order
from engine.data.layouts import Layout
from engine.data.pair_tokens import Limits, PairTokens
from engine.data.rows import as_rows
from engine.data.tokenization import encode_rows
from engine.inspection.summary import Lengths, Shape, Side, batches, parts, summarise
from tests.engine.tiny_tokenizers import make

# Prompt, chosen, rejected; EOS comes to each answer.
ROWS = [("pqrs", "abc", "x"), ("p", "a", "bcdef"), ("p" * 9, "a", "b"), ("pq", "", "")]


def encode(*limits) -> PairTokens:
    names = ("prompt", "chosen", "rejected")
    rows = as_rows([dict(zip(names, row, strict=True)) for row in ROWS])
    return encode_rows(rows, make(), Limits(*limits))


def test_lengths_and_what_is_cut():
    # |pqrs|a|bc$  pqrs|x|$     p|a$  p|bcde|f$     dropped     pq|$  pq|$
    summary = summarise(encode(None, None, 5, "keep_start"), len(ROWS))
    assert (summary.rows, summary.pairs, summary.pairs_cut) == (4, 3, 2)
    assert summary.sides == {
        "chosen": Side(1, 0, 1, tokens_cut=3, completion=4, scored=4),
        "rejected": Side(2, 0, 2, tokens_cut=3, completion=6, scored=6),
    }
    for name, expected in (
        ("prompt", Lengths(1, 2, 7 / 3, 3.8, 4, 7)),
        ("rejected", Lengths(1, 1, 2, 3.7, 4, 6)),
    ):
        assert summary.lengths[name] == pytest.approx(expected)
    assert summary.lengths["sequence"].total == summary.tokens == 24
    assert (summary.scored, summary.tokens_cut) == (10, 6)
    assert summary.chosen_longer == summary.rejected_longer == 1 / 3
    assert summary.mean_difference == pytest.approx((2 - 4 + 0) / 3)
    assert summary.weights == (1, 1)


def test_lengths_before_cutting():
    whole = parts(encode(None, None, None, "keep_start"))
    assert whole.prompt.tolist() == [4, 1, 9, 2]
    assert whole.chosen.tolist() == [4, 2, 2, 1]
    assert whole.rejected.tolist() == [2, 6, 2, 1]
    assert whole.longest.tolist() == [8, 7, 11, 3]
    for limits in ((None, None, 5, "keep_start"), (2, 3, 4, "keep_end")):
        pairs = encode(*limits)
        cut = parts(pairs)
        np.testing.assert_array_equal(cut.longest, whole.longest[pairs.rows])
    assert parts(encode(2, 3, None, "keep_start")).prompt.tolist() == [4, 1, 9, 2]


def test_tokens_that_are_read_only():
    pairs = encode(None, None, None, "keep_start")
    scored = pairs.scored.copy()
    scored[pairs.offsets[0] + 4] = False
    summary = summarise(
        PairTokens(
            tokens=pairs.tokens,
            scored=scored,
            offsets=pairs.offsets,
            completion_start=pairs.completion_start,
            rows=pairs.rows,
            weights=np.array([0.5, 2, 1, 1], np.float32),
        ),
        len(ROWS),
    )
    chosen = summary.sides["chosen"]
    assert (chosen.completion, chosen.scored) == (9, 8)
    assert summary.weights == (0.5, 2) and summary.tokens_cut == 0


def test_what_batches_are_padded_to():
    pairs = encode(None, None, None, "keep_start")
    plan = BatchPlan(Order(num_pairs=4, pairs_per_batch=2), Layout(pairs, 2, 1, 2), 6)
    found = batches(pairs, plan)
    assert (found.pairs_per_batch, found.steps, found.steps_per_epoch) == (2, 6, 2)
    # Longest sequences of 8 and 11 tokens: two lengths, or one that serves both.
    assert sum(shape.batches for shape in found.shapes) == 2
    length = sum(shape.length * shape.batches for shape in found.shapes)
    tokens = int(pairs.lengths.sum())
    assert found.padding == pytest.approx(1 - tokens / (4 * length))
    assert found.shapes[-1] == Shape(16, 128, found.shapes[-1].batches)
    scored = int(pairs.num_scored.sum())
    assert found.scored_padding == pytest.approx(1 - scored / (2 * 2 * 128))
