"""Data that is surely not meant is said to be so, once, with a count and a place."""

import dataclasses
import json

import pytest
from datasets import Dataset

from engine.data.doubts import Doubts
from engine.data.forms import PairRow, read_pairs
from engine.data.pairs import (
    Limits,
    check_limits,
    tokenize_pairs,
    warn_beyond_positions,
)
from engine.data.rows import as_rows
from engine.errors import InputError
from tests.engine.tiny_tokenizers import make

GOOD = {"prompt": "Tea or not?", "chosen": "Tea.", "rejected": "Not."}
OK = [GOOD] * 4


def turn(role: str, content: str) -> list[dict]:
    return [{"role": role, "content": content}]


def row(prompt, chosen, rejected) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def as_text(role: str, content: str) -> str:
    return json.dumps(turn(role, content))


def warnings(rows, caplog, tmp_path, tokenizer=None, **options) -> list[str]:
    """What is said when rows are tokenised, and again when they are read from disk."""
    said = []
    for _ in range(2):
        caplog.clear()
        options = {"max_length": None, "cache_dir": tmp_path} | options
        tokenize_pairs(rows, tokenizer or make(), **options)
        said.append(
            [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        )
    assert said[0] == said[1]
    return said[0]


TURNS = turn("user", "Tea?")
TURNS_BACK = turn("assistant", "b")
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
}
DOUBTFUL = {
    "tools": (
        row(TURNS, TURNS_BACK, turn("assistant", "a")) | {"tools": [{"name": "f"}]},
        "have tools that the chat template writes nothing of",
    ),
    "json": (
        row(
            as_text("user", "Tea?"),
            as_text("assistant", "a"),
            as_text("assistant", "b"),
        ),
        "hold messages as text in a cell (JSON)",
    ),
    "python's notation": (
        row("Tea?", str(turn("assistant", "a")), str(turn("assistant", "b"))),
        "hold messages as text in a cell (JSON)",
    ),
    "prompt in text": (
        row("Tea or not? ", "Tea or not? Tea.", " Tea or not? Not."),
        "repeat the prompt at the start of chosen and rejected",
    ),
    "prompt in messages": (
        row(TURNS, TURNS + turn("assistant", "a"), TURNS + turn("assistant", "b")),
        "repeat the prompt at the start of chosen and rejected",
    ),
    "no prompt": (
        {"chosen": "Tea.", "rejected": "Not."},
        "have no prompt: the field is not there",
    ),
    "empty text": (row("Tea?", "Tea.", ""), "have an answer without text"),
    "blank text": (row("Tea?", " \n", "Not."), "have an answer without text"),
    "empty message": (
        row(TURNS, turn("assistant", " "), turn("assistant", "b")),
        "have an answer without text",
    ),
    "no parts": (
        row(TURNS, [{"role": "assistant", "content": []}], turn("assistant", "b")),
        "have an answer without text",
    ),
    "a user's answer": (
        row(TURNS, turn("assistant", "a"), turn("user", "b")),
        "have an answer that does not start with a message of the role assistant",
    ),
    "a user's answer, prompt in both": (
        {"chosen": TURNS + turn("user", "a"), "rejected": TURNS + TURNS_BACK},
        "have an answer that does not start with a message of the role assistant",
    ),
    "equal text": (
        row("Tea?", "Tea.", "Tea."),
        "have the same tokens in chosen and rejected",
    ),
    "equal messages": (
        row(TURNS, turn("assistant", "a"), turn("assistant", "a")),
        "have the same tokens in chosen and rejected",
    ),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_what_is_surely_not_meant_is_said_once(name, caplog, tmp_path):
    bad, message = DOUBTFUL[name]
    (said,) = warnings([*OK, bad, GOOD, bad], caplog, tmp_path)
    first = "2 of 7 rows (the first: the data set, row 4 (counting from 0)) "
    assert said.startswith(first + message)


def test_a_template_that_writes_the_prompt_otherwise(caplog, tmp_path):
    """What was thought is left out of all but the last turn of the assistant."""
    template = (
        "{% for m in messages %}{{ m['role'] }}:"
        "{% if loop.index < messages | length - 1 and m['role'] == 'assistant' %}"
        "{{ m['content'][3:] }}{% else %}{{ m['content'] }}{% endif %};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    asked = turn("user", "Tea?") + turn("assistant", "<t>Yes.") + turn("user", "Now?")
    rewritten = row(asked, turn("assistant", "a"), turn("assistant", "b"))
    short = row(turn("user", "Tea?"), *[turn("assistant", x) for x in "ab"])
    tokenizer = make(template=template)
    said = warnings([short, rewritten], caplog, tmp_path, tokenizer=tokenizer)
    assert len(said) == 1
    start = (
        "1 of 2 rows (the first: the data set, row 1 (counting from 0)) have messages"
    )
    assert said[0].startswith(start)
    end = "The first: '<t>Yes.;user:Now?;' becomes 'Yes.;user:Now?;assis'"
    assert said[0].endswith(end)


def test_a_call_of_a_tool_is_no_empty_answer():
    doubts = Doubts()
    for number, call in enumerate((CALL, {**CALL, "tool_calls": None})):
        (pair,) = read_pairs(row(TURNS, [call], TURNS_BACK), "row")
        assert isinstance(pair, PairRow)
        doubts.see_row(number, pair)
    assert doubts.found() == (("empty answer", 1, 1, ""),)


def test_columns_beside_a_missing_prompt_are_named(caplog, tmp_path):
    rows = Dataset.from_list([{"id": 1, "chosen": "a", "rejected": "b"}])
    (said,) = warnings(rows, caplog, tmp_path)
    assert said.startswith("1 of 1 rows") and said.endswith("(not read: id)")


def test_pairs_that_a_limit_makes_equal(caplog, tmp_path):
    rows = [row("p", "abcd", "abce"), row("p", "abcd", "xbce")]
    assert warnings(rows, caplog, tmp_path) == []
    (said,) = warnings(rows, caplog, tmp_path, max_length=4)
    assert said.startswith(
        "1 of 2 rows (the first: the data set, row 0 (counting from 0))"
    )


def test_what_may_be_meant_is_not_said(caplog, tmp_path):
    rows = [
        *OK,
        row("I", "I am", "I was"),  # too short to be no chance
        row("Tea or not?", "Tea or not? Tea.", "Not."),  # one side only
        row("Write JSON.", '[{"tea": "green"}]', "[1, 2]"),
        row(TURNS, turn("assistant", "Tea?"), turn("assistant", "Tea")),
        {"chosen": TURNS + turn("assistant", "a"), "rejected": TURNS + TURNS_BACK},
        {"chosen": "Tea? Yes.", "rejected": "Tea? No."},
        {"chosen": "Tea? Yes.", "rejected": "Tea? No.", "prompt_id": "7"},
        row("Tea?", TURNS + turn("assistant", "a"), TURNS + turn("assistant", "b")),
    ]
    assert warnings(rows, caplog, tmp_path) == []


@pytest.mark.parametrize("prompt", ["Tea? ", " Tea?", "Tea?\n"])
def test_a_text_prompt_may_differ_by_white_space_from_the_message(prompt, tmp_path):
    chosen, rejected = (TURNS + turn("assistant", answer) for answer in ("a", "b"))
    with_text = tokenize_pairs(
        [row(prompt, chosen, rejected)], make(), max_length=None, cache_dir=tmp_path
    )
    without = tokenize_pairs(
        [{"chosen": chosen, "rejected": rejected}],
        make(),
        max_length=None,
        cache_dir=tmp_path,
    )
    assert with_text.tokens.tolist() == without.tokens.tolist()


def test_positions_beyond_the_models(caplog, tmp_path):
    rows = [row("p", "a" * n, "b") for n in (3, 12, 3, 15)]
    pairs = tokenize_pairs(rows, make(), max_length=20, cache_dir=tmp_path)
    warn_beyond_positions(pairs, 20, 20)
    assert not caplog.records
    warn_beyond_positions(pairs, 20, 10)
    warn_beyond_positions(pairs, 20, 19)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == (
        "max_length=20 is above the 10 positions of the model (max_position_embeddings)"
        ": 2 of 4 pairs are longer, the first of them row 1 (counting from 0); lower "
        "max_length"
    )
    assert ": none of 4 pairs is so long; lower max_length" in second


def test_limits_that_tokens_were_not_cut_by(tmp_path):
    data = [row("p", "abc", "b")]
    pairs = tokenize_pairs(data, make(), max_length=8, cache_dir=tmp_path)
    limits = Limits(None, None, 8, "keep_start")
    check_limits(pairs, limits)
    with pytest.raises(InputError, match="^max_length=9 has no effect .*max_length=8;"):
        check_limits(pairs, limits._replace(max_length=9))
    with pytest.raises(InputError, match="^truncation_mode='keep_end' has no effect"):
        check_limits(pairs, limits._replace(truncation_mode="keep_end"))


def test_limits_of_tokens_that_come_from_elsewhere(tmp_path):
    data = [row("p", "abc", "b")]
    pairs = tokenize_pairs(data, make(), max_length=8, cache_dir=tmp_path)
    pairs = dataclasses.replace(pairs, limits=None)
    check_limits(pairs, Limits(3, None, 5, "keep_end"))
    with pytest.raises(InputError, match="^max_length=4 .* longest sequence has 5 tok"):
        check_limits(pairs, Limits(None, None, 4, "keep_start"))


# ---------------------------------------------------------------- datasets.Dataset


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda data: data.with_transform(lambda rows: rows),
            "the data set's transform (with_transform or set_transform) is not applied "
            "to its 4 rows; apply it with map() instead",
        ),
        (
            lambda data: data.with_format("numpy"),
            "the data set's format (numpy, columns prompt, chosen, rejected) is not "
            "used: its 4 rows are read as Python values, from all columns; leave out "
            "set_format or with_format",
        ),
        (
            lambda data: data.with_format(None, columns=["chosen", "rejected"]),
            "the data set's format (python, columns chosen, rejected) is not "
            "used: its 4 "
            "rows are read as Python values, from all columns; leave out set_format or "
            "with_format",
        ),
        (lambda data: data, None),
    ],
)
def test_formats_of_a_data_set_are_not_dropped_in_silence(change, message, caplog):
    rows = as_rows(change(Dataset.from_list(OK)))
    assert [record.getMessage() for record in caplog.records] == [message] * bool(
        message
    )
    assert [batch for _, batch in rows.batches(4)] == [OK]
