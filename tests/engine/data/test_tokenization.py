import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from engine.data.pairs import tokenize_pairs
from engine.data.tokenization import PairTokens
from engine.errors import InputError
from tests.engine.tiny_tokenizers import BOS, EOS, ids, make
from tests.json_lines import read_lines

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))


def tokenize(rows, tokenizer, max_length=None, **options) -> PairTokens:
    rows = [rows] if isinstance(rows, dict) else rows
    return tokenize_pairs(rows, tokenizer, max_length=max_length, **options)


def sequence(pairs: PairTokens, i: int) -> tuple[list[int], list[int]]:
    """(tokens that are not scored, tokens that are) of sequence i."""
    span = slice(pairs.offsets[i], pairs.offsets[i + 1])
    tokens, scored = pairs.tokens[span].tolist(), pairs.scored[span].tolist()
    start = int(pairs.completion_start[i])
    assert scored == [False] * start + [True] * (len(tokens) - start)
    return tokens[:start], tokens[start:]


def text(prompt: str, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def messages(*contents: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


# ---------------------------------------------------------------- agreement with TRL


@pytest.mark.parametrize("name", ["text", "chat"])
def test_training_fixtures_have_trl_tokens(name):
    directory = FIXTURES / "trl" / name
    rows = read_lines(directory / "data.jsonl")
    expected = read_lines(directory / "tokens.jsonl")
    limit = json.loads((directory / "settings.json").read_text())["max_length"]
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    pairs = tokenize(rows, tokenizer, limit)
    assert len(pairs) == len(expected) and pairs.dropped == len(rows) - len(expected)
    for i, row in enumerate(expected):
        for side, key in enumerate(("chosen_ids", "rejected_ids")):
            prompt, scored = sequence(pairs, 2 * i + side)
            assert prompt == row["prompt_ids"]
            assert prompt + scored == (row["prompt_ids"] + row[key])[:limit]


@pytest.mark.parametrize("name", ["bytes", "merging", "space"])
def test_odd_tokenizers_have_trl_tokens(name):
    directory = FIXTURES / "trl_tokens"
    tokenizer = AutoTokenizer.from_pretrained(directory / name)
    all_rows = json.loads((directory / "rows.json").read_text())
    expected = json.loads((directory / "expected.json").read_text())
    compared = 0
    for key, entries in expected.items():
        tokenizer_name, kind, limit, mode = key.split("/")
        if tokenizer_name != name:
            continue
        limit = None if limit == "None" else int(limit)
        # Of a sequence without any scored token TRL makes 0 or NaN; we drop the pair.
        kept = [e for e in entries if sum(e[2][1:]) > 0 and sum(e[4][1:]) > 0]
        if not kept:
            with pytest.raises(InputError, match="none of the 16 pairs"):
                tokenize(all_rows[kind], tokenizer, limit, truncation_mode=mode)
            continue
        pairs = tokenize(all_rows[kind], tokenizer, limit, truncation_mode=mode)
        assert pairs.rows.tolist() == [e[0] for e in kept], key
        for i, (_, *sides) in enumerate(kept):
            for side in (0, 1):
                tokens, mask = sides[2 * side], sides[2 * side + 1]
                prompt, scored = sequence(pairs, 2 * i + side)
                assert prompt + scored == tokens, key
                # The loss never sees a first token: nothing predicts it.
                assert [0] * len(prompt) + [1] * len(scored) == [0, *mask[1:]], key
        compared += len(kept)
    assert compared > 150


# ---------------------------------------------------------------- text


def test_scoring_starts_after_the_longest_common_prefix_of_both():
    # "b" merges with the "c" of chosen, so the prompt's "b" is scored in both.
    pairs = tokenize(text("ab", "cd", "xy"), make(merges="bc"))
    assert sequence(pairs, 0) == (ids("a"), [200, *ids("d"), EOS])
    assert sequence(pairs, 1) == (ids("a"), [*ids("bxy"), EOS])


def test_eos_is_added_once():
    pairs = tokenize(text("p", "c", "r</s>"), make())
    assert sequence(pairs, 0) == (ids("p"), [*ids("c"), EOS])
    assert sequence(pairs, 1) == (ids("p"), [*ids("r"), EOS])


def test_eos_of_a_tokenizer_that_adds_it_is_not_doubled():
    pairs = tokenize(text("p", "", "r</s>"), make(adds_bos=True, adds_eos=True))
    assert sequence(pairs, 0) == ([BOS, *ids("p")], [EOS])
    assert sequence(pairs, 1) == ([BOS, *ids("p")], [*ids("r"), EOS])


def test_eos_where_special_tokens_in_text_are_not_recognised():
    tokenizer = make()
    tokenizer.split_special_tokens = True
    pairs = tokenize(text("p", "c", "r"), tokenizer)
    assert sequence(pairs, 0) == (ids("p"), [*ids("c"), EOS])


@pytest.mark.parametrize("prompt", ["p", "<s>p"])
def test_bos_is_never_twice(prompt):
    pairs = tokenize(text(prompt, "c", "r"), make(adds_bos=True))
    assert sequence(pairs, 0) == ([BOS, *ids("p")], [*ids("c"), EOS])
    assert sequence(pairs, 1) == ([BOS, *ids("p")], [*ids("r"), EOS])


def test_bos_that_is_also_eos():
    tokenizer = make(adds_bos=True, bos="<s>", eos="<s>")
    pairs = tokenize([text("", "", "r"), text("<s>p", "", "r")], tokenizer)
    assert sequence(pairs, 0) == ([BOS], [BOS])
    assert sequence(pairs, 1) == ([BOS], [*ids("r"), BOS])
    assert sequence(pairs, 2) == ([BOS, *ids("p")], [BOS])


def test_a_prompt_without_tokens():
    pairs = tokenize([text("", "cd", "r"), text("", "", "r")], make())
    assert sequence(pairs, 0) == (ids("c"), [*ids("d"), EOS])
    assert sequence(pairs, 1) == (ids("r"), [EOS])
    assert pairs.dropped == 1  # EOS alone has nothing before it


def test_the_shared_start_is_the_prompt():
    rows = [
        {"chosen": "ab cd", "rejected": "ab ce"},
        {"chosen": "ab cd", "rejected": "ab xy"},  # the space goes to the completions
        {"chosen": "x ", "rejected": "yz"},
        {"chosen": "abc", "rejected": "abcde"},
    ]
    pairs = tokenize(rows, make(adds_bos=True))
    starts = [len(sequence(pairs, 2 * i)[0]) - 1 for i in range(4)]
    assert starts == [4, 2, 0, 2]
    assert sequence(pairs, 4)[1] == [*ids("x "), EOS]
    assert sequence(pairs, 7)[1] == [*ids("cde"), EOS]


# ---------------------------------------------------------------- messages


def test_templates_are_left_as_they_are():
    row = text(messages("p"), messages("", "c")[1:], messages("", "r")[1:])  # pyright: ignore
    pairs = tokenize(row, make(adds_bos=True))
    assert sequence(pairs, 0) == ([BOS, *ids("u:p\na:")], ids("c\n"))
    assert sequence(pairs, 1) == ([BOS, *ids("u:p\na:")], ids("r\n"))
    both = {"chosen": messages("p", "c"), "rejected": messages("p", "r")}
    again = tokenize(both, make(adds_bos=True))
    np.testing.assert_array_equal(again.tokens, pairs.tokens)
    with_text = tokenize({"prompt": "p", **both}, make(adds_bos=True))
    np.testing.assert_array_equal(with_text.tokens, pairs.tokens)


def test_tools_and_template_arguments_reach_the_template():
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{{ tools|tojson if tools else '' }}{{ x }}"
    )
    base = {"chosen": messages("p", "c"), "rejected": messages("p", "r", "s")}
    rows = [
        {**base, "tools": '[{"f": 1}]', "chat_template_kwargs": {"x": "y"}},
        {**base, "tools": [{"f": 1}], "chat_template_kwargs": None},
    ]
    pairs = tokenize(rows, make(template=template))
    assert sum(sequence(pairs, 0), []) == ids('pc[{"f": 1}]y')
    assert sum(sequence(pairs, 3), []) == ids('prs[{"f": 1}]')


def test_text_and_messages_may_be_mixed():
    rows = [
        text("p", "c", "r"),
        {"chosen": messages("q", "c"), "rejected": messages("q", "r")},
        text("s", "c", "r"),
    ]
    pairs = tokenize(rows, make(adds_bos=True))
    assert sequence(pairs, 0) == ([BOS, *ids("p")], [*ids("c"), EOS])
    assert sequence(pairs, 3) == ([BOS, *ids("u:q\na:")], ids("r\n"))
    assert sequence(pairs, 4) == ([BOS, *ids("s")], [*ids("c"), EOS])


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("adds_bos", [False, True])
def test_max_prompt_length_keeps_the_end_and_bos(adds_bos):
    rows = [text("abcde", "x", "y"), text("abc", "x", "y")]
    pairs = tokenize(rows, make(adds_bos=adds_bos), max_prompt_length=4)
    cut = [BOS, *ids("cde")] if adds_bos else ids("bcde")
    whole = [BOS, *ids("abc")] if adds_bos else ids("abc")
    assert sequence(pairs, 0) == (cut, [*ids("x"), EOS])
    assert sequence(pairs, 1) == (cut, [*ids("y"), EOS])
    assert sequence(pairs, 2) == (whole, [*ids("x"), EOS])


def test_max_completion_length_cuts_the_end_and_eos():
    pairs = tokenize(text("pp", "abcde", "ab"), make(), max_completion_length=3)
    assert sequence(pairs, 0) == (ids("pp"), ids("abc"))
    assert sequence(pairs, 1) == (ids("pp"), [*ids("ab"), EOS])


def test_keep_start_cuts_the_end_and_drops_pairs_without_completion():
    rows = [text("pppp", "a", "b"), text("ppp", "abc", "d"), text("ppppp", "a", "b")]
    pairs = tokenize(rows, make(), 4)
    assert pairs.rows.tolist() == [1] and pairs.dropped == 2
    assert sequence(pairs, 0) == (ids("ppp"), ids("a"))
    assert sequence(pairs, 1) == (ids("ppp"), ids("d"))


def test_keep_end_cuts_the_start():
    pairs = tokenize(text("pq", "abcd", "e"), make(), 4, truncation_mode="keep_end")
    # Nothing is left before "b", so it cannot be scored.
    assert sequence(pairs, 0) == (ids("b"), [*ids("cd"), EOS])
    assert sequence(pairs, 1) == (ids("pq"), [*ids("e"), EOS])


def test_keep_end_after_the_prompt_was_cut():
    pairs = tokenize(
        [text("pqrs", "abc", "e")],
        make(adds_bos=True),
        4,
        max_prompt_length=3,
        truncation_mode="keep_end",
    )
    # "BOS r s a b c EOS" loses its start, BOS included; "BOS r s e EOS" too.
    assert sequence(pairs, 0) == (ids("a"), [*ids("bc"), EOS])
    assert sequence(pairs, 1) == (ids("rs"), [*ids("e"), EOS])


def test_max_prompt_length_leaves_room_for_the_completion():
    row = text("p" * 50, "ab", "cd")
    with pytest.raises(InputError, match="none of the 1 pairs has a token to score"):
        tokenize(row, make(), 10)
    pairs = tokenize(row, make(), 10, max_prompt_length=9)
    assert sequence(pairs, 0) == (ids("p" * 9), ids("a"))


def test_largest_id():
    assert tokenize(text("a", "~", "b"), make()).max_id == ord("~") + 10


# ---------------------------------------------------------------- whole sets


def test_a_tokenizer_without_padding_or_bos():
    tokenizer = make(bos=None)
    assert tokenizer.pad_token is None
    assert sequence(tokenize(text("p", "c", "r"), tokenizer), 0) == (
        ids("p"),
        [*ids("c"), EOS],
    )


def test_rows_are_tokenised_in_few_calls(monkeypatch):
    calls = []
    encode = PreTrainedTokenizerFast.__call__

    def count(self, texts, **options):
        calls.append(len(texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", count)
    tokenize([text("p", "c", "r")] * 1500, make())
    assert sorted(calls)[-2:] == [1500, 3000] and len(calls) == 5


def test_thousands_of_rows_keep_their_order():
    rows = [text("p", str(i), "r" * (i % 7)) for i in range(2500)]
    pairs = tokenize(rows, make())
    assert pairs.rows.tolist() == list(range(2500))
    for i in (0, 999, 1000, 2499):
        assert sequence(pairs, 2 * i)[1] == [*ids(str(i)), EOS]


@pytest.mark.parametrize("limit", [2**62, 2**63 - 1, 2**64])
def test_limits_beyond_what_integers_hold_are_none(limit):
    for name in ("max_length", "max_prompt_length", "max_completion_length"):
        for mode in ("keep_start", "keep_end"):
            options = {"max_length": None, "truncation_mode": mode} | {name: limit}
            found = tokenize(
                [{"prompt": "p q", "chosen": "c", "rejected": "r"}] * 3,
                make(),
                **options,
            )
            free = tokenize(
                [{"prompt": "p q", "chosen": "c", "rejected": "r"}] * 3,
                make(),
                max_length=None,
            )
            np.testing.assert_array_equal(found.tokens, free.tokens)
            np.testing.assert_array_equal(found.completion_start, free.completion_start)
