"""What tokenisation leaves out: tokens of sequences, and whole rows, and why."""

import pytest

from engine.data.pair_tokens import Limits
from engine.data.rows import as_rows
from engine.data.tokenization import encode_pairs, encode_rows
from engine.errors import InputError
from tests.engine.tiny_tokenizers import make

FIELDS = ("prompt", "chosen", "rejected")


def encode(rows, *limits, **options):
    data = as_rows([dict(zip(FIELDS, r, strict=True)) for r in rows])
    return encode_rows(data, make(**options), Limits(*limits))


@pytest.mark.parametrize(
    "limits, expected",
    [
        # "pqrs" + "abc" + EOS, and "pqrs" + "x" + EOS
        ((None, None, None, "keep_start"), [[0, 0], [0, 0]]),
        ((3, None, None, "keep_start"), [[1, 0], [1, 0]]),
        ((None, 2, None, "keep_start"), [[0, 2], [0, 0]]),
        ((None, None, 5, "keep_start"), [[0, 3], [0, 1]]),
        ((None, None, 3, "keep_end"), [[5, 0], [3, 0]]),
        ((3, 3, 5, "keep_start"), [[1, 2], [1, 0]]),
        ((3, 3, 5, "keep_end"), [[2, 1], [1, 0]]),
        ((2**64, 2**64, 2**64, "keep_end"), [[0, 0], [0, 0]]),
    ],
)
def test_tokens_left_out_in_front_and_behind(limits, expected):
    pairs = encode([("pqrs", "abc", "x")], *limits)
    assert pairs.cut is not None and pairs.cut.tolist() == expected
    assert (pairs.lengths + pairs.cut.sum(axis=1)).tolist() == [8, 6]


def test_a_bos_that_stays_is_not_left_out():
    pairs = encode([("pqrs", "a", "x")], 3, None, None, "keep_start", adds_bos=True)
    assert pairs.cut is not None and pairs.cut.tolist() == [[2, 0], [2, 0]]
    assert pairs.lengths.tolist() == [5, 5]


def test_why_rows_are_dropped():
    rows = [("p" * 9, "a", "b"), ("", "", "r"), ("p", "a", "b"), ("p" * 7, "a", "b")]
    pairs = encode(rows, None, None, 5, "keep_start")
    assert sorted(pairs.drops) == [("cut away", 2, 0), ("nothing to score", 1, 1)]
    assert pairs.dropped == 3 and pairs.rows.tolist() == [2]


def test_reasons_are_counted_over_all_rows():
    rows = [("p", "a", "b"), *[("p" * 9, "a", "b")] * 1500, ("", "", "r")]
    pairs = encode(rows, None, None, 5, "keep_start")
    assert pairs.drops == (("cut away", 1500, 1), ("nothing to score", 1, 1501))


def test_no_pair_is_left():
    rows = as_rows([{"prompt": "", "chosen": "", "rejected": "r"}] * 2)
    limits = Limits(None, None, None, "keep_start")
    assert len(encode_rows(rows, make(), limits)) == 0
    with pytest.raises(InputError) as raised:
        encode_pairs(rows, make(), limits)
    assert str(raised.value) == (
        "none of the 2 pairs has a token to score: of 2, chosen or rejected has "
        "nothing to score even before it is cut; give each answer some text, and one "
        "of its messages another loss_weight than 0"
    )
