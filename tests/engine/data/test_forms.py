"""The forms in which pairs are written down: what each means, and what is no pair."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from engine.data.pairs import PairTokens, tokenize_pairs
from engine.errors import InputError
from tests.engine.tiny_tokenizers import ids, make

# It shows everything that a row may give it.
TEMPLATE = (
    "{{ bos_token }}{{ tools or '' }}{{ mood or '' }}"
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function'] }}{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
USER = {"role": "user", "content": "Tea?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))
HUMAN = {"from": "human", "value": "Tea?"}
GPT_YES, GPT_NO = ({"from": "gpt", "value": text} for text in ("Yes.", "No."))
PLAIN = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
SHAREGPT = {"conversations": [HUMAN], "chosen": GPT_YES, "rejected": GPT_NO}
TOOLS = [{"name": "kettle"}]


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))


def tokenize(*rows, **options) -> PairTokens:
    tokenizer = make(template=TEMPLATE, adds_bos=True)
    return tokenize_pairs(list(rows), tokenizer, max_length=None, **options)


def assert_same(got: PairTokens, want: PairTokens):
    for name in ("tokens", "scored", "offsets", "completion_start", "rows", "weights"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)


def with_value(*messages: dict, **more) -> list[dict]:
    parts = [[{"type": "text", "value": m["content"]}] for m in messages]
    return [m | {"content": p} | more for m, p in zip(messages, parts, strict=True)]


SYSTEM = {"role": "system", "content": "Be kind."}
CALL = {
    "role": "assistant",
    "tool_calls": [
        {"type": "function", "function": {"name": "boil", "arguments": {"c": 100}}}
    ],
}
CALLED = {"from": "function_call", "value": '{"name": "boil", "arguments": {"c": 100}}'}
GOT = {"role": "tool", "content": "hot"}
SAME = {
    "sharegpt": (SHAREGPT, PLAIN),
    "sharegpt, answers as text": (
        SHAREGPT | {"chosen": "Yes.", "rejected": "No."},
        PLAIN,
    ),
    "sharegpt, system among the turns": (
        SHAREGPT | {"conversations": [{"from": "system", "value": "Be kind."}, HUMAN]},
        PLAIN | {"prompt": [SYSTEM, USER]},
    ),
    "sharegpt, a column system": (
        SHAREGPT | {"system": "Be kind.", "tools": json.dumps(TOOLS)},
        PLAIN | {"prompt": [SYSTEM, USER], "tools": TOOLS},
    ),
    "sharegpt, an empty system": (SHAREGPT | {"system": "", "tools": ""}, PLAIN),
    "sharegpt, a tool": (
        SHAREGPT
        | {"conversations": [HUMAN, CALLED, {"from": "observation", "value": "hot"}]},
        PLAIN | {"prompt": [USER, CALL, GOT]},
    ),
    "sharegpt, a call as the answer": (
        SHAREGPT | {"chosen": CALLED},
        PLAIN | {"chosen": [CALL]},
    ),
    "sharegpt, filled in by Arrow": (
        SHAREGPT | {"prompt": None, "system": None},
        PLAIN,
    ),
    "from and value": (
        {"prompt": [HUMAN], "chosen": [GPT_YES], "rejected": [GPT_NO]},
        PLAIN,
    ),
    "one message without a list": (PLAIN | {"chosen": YES, "rejected": NO}, PLAIN),
    "implicit prompt": ({"chosen": [USER, YES], "rejected": [USER, NO]}, PLAIN),
    "implicit prompt, and its question": (
        {"chosen": [USER, YES], "rejected": [USER, NO], "question": "Tea?"},
        PLAIN,
    ),
    "implicit prompt, weighed": (
        {
            "chosen": [USER | {"loss_weight": 0}, YES],
            "rejected": [USER, NO | {"loss_weight": 1}],
        },
        PLAIN,
    ),
    "messages": (
        {"chosen_messages": [USER, YES], "rejected_messages": [USER, NO]},
        PLAIN,
    ),
    "messages in parts": (
        {
            "chosen_messages": with_value(USER, YES, loss_weight=1.0),
            "rejected_messages": with_value(USER, NO, loss_weight=1.0),
        },
        PLAIN,
    ),
    "tools as text": (PLAIN | {"tools": json.dumps(TOOLS)}, PLAIN | {"tools": TOOLS}),
}


@pytest.mark.parametrize("name", SAME)
def test_one_pair_in_two_forms(name):
    row, plain = SAME[name]
    assert_same(tokenize(row), tokenize(plain))


def test_what_a_row_gives_the_template_is_used():
    """Otherwise the comparisons above say nothing."""
    mood = {"mood": "calm", "other": None}
    more = {"tools": TOOLS}, {"chat_template_kwargs": mood}
    rows = [PLAIN, *(PLAIN | x for x in (*more, {"prompt": [USER, CALL, GOT]}))]
    lengths = tokenize(*rows).lengths[::2] - tokenize(PLAIN).lengths[0]
    calls = len("assistant:") + len(str(CALL["tool_calls"][0]["function"]))
    expected = [0, len(str(TOOLS)), len("calm"), calls + len("tool:hot")]
    assert lengths.tolist() == expected


def test_tools_of_the_run_are_for_rows_without():
    assert_same(
        tokenize(PLAIN, PLAIN | {"tools": [{"name": "cup"}]}, tools=TOOLS),
        tokenize(PLAIN | {"tools": TOOLS}, PLAIN | {"tools": [{"name": "cup"}]}),
    )


def test_several_rejected_answers_are_a_pair_each():
    text = {"prompt": "p", "chosen": "c"}
    found = tokenize(
        text | {"rejected": ["a", "b"]},
        PLAIN | {"rejected": [[NO], [YES, USER, NO]], "weight": 2},
        {"chosen": "say c", "rejected": ["say a"]},
    )
    want = tokenize(
        text | {"rejected": "a"},
        text | {"rejected": "b"},
        PLAIN | {"weight": 2},
        PLAIN | {"rejected": [YES, USER, NO], "weight": 2},
        {"chosen": "say c", "rejected": "say a"},
    )
    assert found.rows.tolist() == [0, 0, 1, 1, 2]
    assert_same(found, dataclasses.replace(want, rows=found.rows))


def test_token_ids_are_taken_as_they_are():
    data = {"prompt_ids": ids("p"), "chosen_ids": ids("ab"), "rejected_ids": ids("c")}
    old = {
        "prompt_input_ids": [0, *ids("p")],
        "prompt_attention_mask": [0, 1],
        "chosen_input_ids": [*ids("ab"), 0, 0],
        "chosen_attention_mask": [1, 1, 0, 0],
        "rejected_input_ids": ids("c"),
        "rejected_attention_mask": [1],
    }
    ours = {"prompt_ids": [1, *ids("p")], "chosen_ids": [*ids("a"), 2]}
    ours["rejected_ids"] = [*ids("b"), 2]
    found = tokenize(data, old, ours, data | {"rejected_ids": [ids("c"), ids("d")]})
    pair = [*ids("p"), *ids("ab"), *ids("p"), *ids("c")]
    text = tokenize({"prompt": "p", "chosen": "a", "rejected": "b"})
    last = pair + [*ids("p"), *ids("ab"), *ids("p"), *ids("d")]
    assert found.tokens.tolist() == [*pair, *pair, *text.tokens, *last]
    assert found.completion_start.tolist() == [1, 1, 1, 1, 2, 2, 1, 1, 1, 1]
    assert found.rows.tolist() == [0, 1, 2, 3, 3]
    for score in ("assistant", "last_turn"):
        assert_same(tokenize(data, score=score), tokenize(data))


def test_weights_count_pairs_and_0_leaves_out(caplog):
    rows = [PLAIN | {"weight": w} for w in (2, 0.5, "1.5", 0, None)]
    found = tokenize(*rows, PLAIN)
    assert found.weights.tolist() == [2, 0.5, 1.5, 1, 1]
    assert found.rows.tolist() == [0, 1, 2, 4, 5]
    assert (found.dropped, found.weightless) == (0, 1)
    assert "1 of 6 pairs are dropped (the first: the data set, row 3" in caplog.text
    assert "their weight is 0" in caplog.text
    with pytest.raises(InputError, match="of 2, their weight is 0"):
        tokenize(rows[3], rows[3])


IDS = {"prompt_ids": [20], "chosen_ids": [20], "rejected_ids": [20]}
BAD = {
    "weight": (PLAIN | {"weight": -1}, "field 'weight', is -1; it must be a finite"),
    "infinite": (PLAIN | {"weight": float("inf")}, "field 'weight', is inf; it must"),
    "no number": (PLAIN | {"weight": "x"}, "field 'weight', is 'x'; it must be a"),
    "too small": (PLAIN | {"weight": 1e-60}, "field 'weight', is 1e-60; it must be"),
    "true": (PLAIN | {"weight": True}, "field 'weight', is True; it must be a finite"),
    "id": (IDS | {"chosen_ids": [20, 9000]}, "has the token id 9000 in its chosen"),
    "negative id": (IDS | {"prompt_ids": [-1]}, "has the token id -1 in its prompt"),
    "no id": (IDS | {"chosen_ids": [2.0]}, "'chosen_ids', entry 0, is 2.0; token ids"),
    "no ids": (IDS | {"rejected_ids": []}, "has no token ids in its rejected; give"),
    "half ids": (IDS | {"rejected_ids": None}, "has no 'rejected_ids'; tokenised rows"),
    "mask": (
        {k.replace("ids", "input_ids"): v for k, v in IDS.items()}
        | {"chosen_attention_mask": [1, 1]},
        "'chosen_input_ids', has 1 ids, whose attention mask must be as many",
    ),
    "order": (
        SHAREGPT | {"conversations": [HUMAN, HUMAN]},
        "'conversations', message 1, is of the role 'user'; after a system message",
    ),
    "gpt first": (
        SHAREGPT | {"conversations": [GPT_NO, HUMAN]},
        "'conversations', message 0, is of the role 'assistant'; after a system",
    ),
    "ends with an answer": (
        SHAREGPT | {"conversations": [HUMAN, GPT_NO]},
        "'conversations', must end with a message from human or observation",
    ),
    "from": (
        SHAREGPT | {"chosen": {"from": "gtp", "value": "a"}},
        "field 'chosen', message 0, is from 'gtp'; that must be one of human, gpt,",
    ),
    "human answers": (
        SHAREGPT | {"rejected": HUMAN},
        "field 'rejected', begins with a message of the role 'user'; an answer must",
    ),
    "two systems": (
        SHAREGPT
        | {"conversations": [{"from": "system", "value": "x"}, HUMAN], "system": "y"},
        "has a field 'system' and a system message in 'conversations'; leave one",
    ),
    "no call": (
        SHAREGPT | {"chosen": CALLED | {"value": "boil"}},
        "field 'chosen', message 0, is not JSON (Expecting value",
    ),
    "no value": (
        SHAREGPT | {"chosen": {"from": "gpt"}},
        "field 'chosen', message 0, has no 'value'; a message is {\"from\": \"human\"",
    ),
    "no list": (SHAREGPT | {"conversations": "a"}, "'conversations', is text; it must"),
    "mixed": (
        PLAIN | {"rejected": [[NO], "No."]},
        "field 'rejected', holds entries of several kinds; give one answer (text, or",
    ),
    "empty list": (PLAIN | {"rejected": []}, "'rejected', is an empty list; give at"),
    "argument": (
        PLAIN | {"chat_template_kwargs": {"add_generation_prompt": True}},
        "'chat_template_kwargs', has 'add_generation_prompt', which says how the",
    ),
    "two texts": (
        PLAIN | {"chosen": with_value(YES)[0] | {"content": [{"type": "audio"}]}},
        "message 0, has the content [{'type': 'audio'}]; a message is",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_pair_is_named_in_one_line(name):
    row, message = BAD[name]
    with pytest.raises(InputError) as caught:
        tokenize(PLAIN, row)
    said = str(caught.value)
    assert said.startswith("the data set, row 1 (counting from 0), ")
    assert message in said and "\n" not in said and len(said) < 400


@pytest.mark.parametrize(
    "name",
    ["tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length"]
    + ["add_generation_prompt", "continue_final_message", "chat_template", "tools"]
    + ["return_assistant_tokens_mask", "tokenizer_kwargs", "conversation", "messages"],
)
def test_a_row_cannot_change_how_the_template_is_called(name):
    with pytest.raises(InputError, match=f"row 0 .* has '{name}', which says how"):
        tokenize(PLAIN | {"chat_template_kwargs": {name: 1}})


def test_forms_in_a_dataset(caplog):
    """Where columns are typed, and Arrow fills in what a row has not."""
    rows = [SHAREGPT | {"system": None, "weight": None}]
    rows.append(SHAREGPT | {"system": "Be kind.", "weight": 2.0})
    assert_same(tokenize_dataset(rows), tokenize(*rows))
    messages = {"chosen_messages": with_value(USER, YES, loss_weight=1.0)}
    messages["rejected_messages"] = with_value(USER, NO, loss_weight=1.0)
    assert_same(tokenize_dataset([messages, messages]), tokenize(messages, messages))
    implicit = {"chosen": [USER, YES], "rejected": [USER, NO], "question": "Tea?"}
    assert_same(tokenize_dataset([implicit]), tokenize(PLAIN))
    assert all(record.levelname != "WARNING" for record in caplog.records)
    both = IDS | {"chosen": "a", "rejected": "b"}
    assert tokenize_dataset([both]).tokens.tolist() == [20] * 4
    assert "chosen, rejected are not read, since prompt_ids, chosen_ids" in caplog.text


def test_every_example_of_the_documentation_is_read():
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    rows, decoder = [], json.JSONDecoder()
    for block in text.split("```json")[1:]:
        rest = block.split("```")[0].strip()
        while rest:
            row, end = decoder.raw_decode(rest)
            rows.append(row)
            rest = rest[end:].strip()
    assert len(rows) == 10
    assert len(tokenize(*rows)) == 11


def tokenize_dataset(rows: list[dict]) -> PairTokens:
    tokenizer = make(template=TEMPLATE, adds_bos=True)
    return tokenize_pairs(Dataset.from_list(rows), tokenizer, max_length=None)
