"""Rows as tokens: what is scored, cut and read, and how that looks."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from engine.data.pair_tokens import Limits
from engine.data.rows import as_rows
from engine.data.tokenization import encode_rows
from engine.inspection.runs import Kind, Run, shown_pairs
from engine.inspection.screen import Screen
from engine.inspection.tokens import TokenPrinter, View
from tests.engine.tiny_tokenizers import BOS, EOS, ids, make

NO_LIMIT = Limits(None, None, None, "keep_start")
P, S, U, C = Kind.PROMPT, Kind.SCORED, Kind.UNSCORED, Kind.CUT
BYTES = Path(__file__).parents[2] / "fixtures" / "trl_tokens" / "bytes"
OTHER = ("pppppp", "a", "b")  # which all limits leave something of


def shown(row, limits=NO_LIMIT, which=0, tokenizer=None):
    names = ("prompt", "chosen", "rejected")
    rows = as_rows([dict(zip(names, x, strict=True)) for x in (row, OTHER)])
    tokenizer = tokenizer or make()
    pairs = encode_rows(rows, tokenizer, limits)
    (found,) = shown_pairs(rows, pairs, tokenizer, None, which)
    return found


def run(kind: Kind, text: str, *more: int) -> Run:
    return Run(kind, (*ids(text), *more))


def test_a_row_that_nothing_is_cut_from():
    row = shown(("pq", "abc", "x"))
    assert (row.row, row.pair, row.reason, row.weight) == (0, 0, None, 1)
    chosen, rejected = row.sides
    assert chosen.prompt == rejected.prompt == (run(P, "pq"),)
    assert chosen.completion == (run(S, "abc", EOS),)
    assert rejected.completion == (run(S, "x", EOS),)


@pytest.mark.parametrize(
    "limits, prompt, completion",
    [
        ((2, None, None, "keep_start"), [run(C, "pq"), run(P, "rs")], [S]),
        ((None, 2, None, "keep_start"), [run(P, "pqrs")], [S, C]),
        ((None, None, 6, "keep_start"), [run(P, "pqrs")], [S, C]),
        ((None, None, 5, "keep_end"), [run(C, "pqr"), run(P, "s")], [S]),
        # The first token that is left has none before it, so it cannot be scored.
        ((None, None, 3, "keep_end"), [run(C, "pqrs")], [C, U, S]),
    ],
)
def test_where_a_sequence_is_cut(limits, prompt, completion):
    chosen, _ = shown(("pqrs", "abc", "abd"), Limits(*limits)).sides
    assert chosen.prompt == tuple(prompt)
    assert [found.kind for found in chosen.completion] == completion
    whole = [x for found in chosen.completion for x in found.ids]
    assert whole == [*ids("abc"), EOS]


def test_a_bos_that_stays_before_what_is_cut():
    limits = NO_LIMIT._replace(max_prompt_length=3)
    tokenizer = make(adds_bos=True)
    chosen, _ = shown(("pqrs", "a", "b"), limits, tokenizer=tokenizer).sides
    assert chosen.prompt == (Run(P, (BOS,)), run(C, "pq"), run(P, "rs"))


def test_a_dropped_row_and_the_pair_numbers_after_it():
    limits = NO_LIMIT._replace(max_length=8)
    row = shown(("p" * 9, "a", "b"), limits)
    assert row.pair is None and row.reason is not None
    assert "max_length=8 (keep_start) leaves nothing to score" in row.reason
    assert row.sides[0].prompt == (run(C, "p" * 9),)
    assert shown(("p" * 9, "a", "b"), limits, which=1).pair == 0
    nothing = shown(("", "", "b"))
    assert nothing.sides == () and "nothing to score even before" in str(nothing.reason)


def printed(
    row, width=60, colours=None, ids=False, full=False, limits=NO_LIMIT, tokenizer=None
) -> str:
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        color_system=colours,
        force_terminal=colours is not None,
        markup=False,
        emoji=False,
        highlight=False,
    )
    screen = Screen(console, shades=colours == "256")
    tokenizer = tokenizer or make()
    printer = TokenPrinter(screen, tokenizer, View(ids=ids, full=full))
    printer.pair(shown(row, limits, tokenizer=tokenizer))
    return out.getvalue()


def test_plain_text():
    limits = NO_LIMIT._replace(max_completion_length=5)
    tokenizer = make(merges="th ab")
    row = ("q\nthe", "ab\n\nc|d", "[b] x")
    assert printed(row, limits=limits, tokenizer=tokenizer) == (
        "\n"
        "--- row 0, pair 0 ------------------------------------------\n"
        "from        the data set, row 0 (counting from 0)\n"
        "prompt: 4 tokens\n"
        "  prompt    |q|\\n|\n"
        "            |th|e|\n"
        "chosen: 7 tokens, 5 scored, 2 cut\n"
        "  scored    |ab|\\n|\n"
        "            |\\n|\n"
        "            |c|||\n"
        "  cut       |d|</s>|\n"
        "rejected: 6 tokens, 5 scored, 1 cut\n"
        "  scored    |[|b|]| |x|\n"
        "  cut       |</s>|\n"
    )


def test_prompts_that_are_cut_otherwise_are_shown_with_each_side():
    limits = NO_LIMIT._replace(max_length=4, truncation_mode="keep_end")
    said = printed(("pq", "ab", "x"), limits=limits)
    assert "prompt:" not in said
    assert "chosen: 5 tokens, 3 scored, 1 cut\n  cut       |p|\n" in said
    assert "rejected: 4 tokens, 2 scored\n  prompt    |p|q|\n" in said


def test_lines_fit_and_lose_nothing():
    row = ("p" * 300, "word " * 30, "x")
    for width in (40, 61, 80):
        said = printed(row, width=width, full=True)
        assert max(map(len, said.splitlines())) <= width
        tokens = said.replace("|\n            |", "|").split("  prompt    |")[1]
        assert tokens.startswith("p|" * 300 + "\nchosen")


def test_a_token_that_is_longer_than_a_line():
    tokenizer = make()
    tokenizer.add_tokens("long" * 30)
    said = printed(("q" + "long" * 30 + "r", "a", "b"), width=40, tokenizer=tokenizer)
    lines = said.split("  prompt    ")[1].split("chosen")[0].splitlines()
    assert max(len(line.strip()) for line in lines) <= 28
    assert "".join(line.strip() for line in lines) == f"|q|{'long' * 30}|r|"


def test_long_runs_are_shown_in_part():
    said = printed(("q", "word " * 60, "x"))
    lines = [x.strip() for x in said.split("scored    ")[1].splitlines()]
    hidden = [i for i, line in enumerate(lines) if "--full shows them" in line]
    assert hidden == [6]
    lines = lines[: lines.index("rejected: 2 tokens, all scored")]
    number = int(lines[6].split()[3])
    whole = printed(("q", "word " * 60, "x"), full=True)
    assert "--full" not in whole and whole.count("w|o|r|d") > 50
    shown_tokens = sum(x.count("|") - 1 for x in lines[:6] + lines[7:])
    assert shown_tokens + number == 301


def test_ids():
    said = printed(("q", "a", "b"), ids=True)
    assert f"|{ids('a')[0]}:a|{EOS}:</s>|" in said


def test_several_tokens_of_one_character():
    tokenizer = AutoTokenizer.from_pretrained(BYTES)
    row = ("q", "é漢 ok", "b")
    assert "|é|漢(3)| |o|k|" in printed(row, tokenizer=tokenizer)
    # Cut amid a character: two of its bytes are scored, one is left out.
    limits = NO_LIMIT._replace(max_completion_length=3)
    said = printed(row, tokenizer=tokenizer, limits=limits)
    assert "|é|\\xe6|\\xbc|\n  cut       |\\xa2| |o|k|</s>|" in said


def test_colours_tell_kinds_and_neighbours_apart():
    limits = NO_LIMIT._replace(max_completion_length=2)
    said = printed(("pq", "abc", "x"), colours="256", limits=limits)
    for shade in (153, 189, 157, 194, 217, 224):  # of prompt, scored and cut
        assert f"48;5;{shade}m" in said
    assert "|" not in said
    few = printed(("pq", "abc", "x"), colours="standard", limits=limits)
    assert "48;5" not in few and "\x1b[32ma" in few and "|" in few


def test_text_cannot_reach_the_terminal():
    """No control sequence of the data's is sent, in whatever colours."""
    tokenizer = make(merges="")
    tokenizer.add_tokens("\x1b[2J")
    said = printed(("q\x1b[2J", "a", "b"), colours="256", tokenizer=tokenizer)
    assert "\\x1b[2J" in said and "\x1b[2J" not in said


def says(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content} | more


def test_turns_that_are_read_only_and_several_rejected_answers():
    tokenizer = make()
    answer = [says("assistant", "x"), says("user", "q"), says("assistant", "y")]
    row = {
        "prompt": [says("user", "p")],
        "chosen": answer,
        "rejected": [answer[:1], [says("assistant", "z", loss_weight=0)], answer[2:]],
    }
    rows = as_rows([row, row | {"weight": 0}])
    pairs = encode_rows(rows, tokenizer, NO_LIMIT, "assistant")
    first, second, third = shown_pairs(rows, pairs, tokenizer, None, 0)
    assert (first.pair, second.pair, third.pair) == (0, 1, None)
    chosen = (run(S, "x\n"), run(U, "u:q\na:"), run(S, "y\n"))
    assert first.sides[0].completion == second.sides[0].completion == chosen
    assert third.sides == () and "nothing to score even before" in str(third.reason)
    weightless = list(shown_pairs(rows, pairs, tokenizer, None, 1))
    assert [pair.reason for pair in weightless] == [
        "their weight is 0, which leaves them out"
    ] * 3
