"""Rows and data files of any kind end in pairs, or in one clear line."""

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.columns import FIELDS, FORMS
from engine.data.forms import read_pairs
from engine.data.json_files import json_rows
from engine.data.pair_tokens import Limits
from engine.data.reference_logps import with_columns
from engine.data.rows import as_rows
from engine.data.text_files import csv_rows
from engine.data.tokenization import encode_pairs
from tests.engine import tiny_tokenizers
from tests.engine.fuzzing import JSON, TEXT, examples, mutated, one_line_or_success

LIMITS = Limits(
    max_prompt_length=None,
    max_completion_length=20,
    max_length=60,
    truncation_mode="keep_start",
)


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


PARTS = [{"type": "text", "text": "hi"}, {"type": "text", "value": "you"}]
# A row of each form, with all that it may have.
ROWS: list[dict[str, Any]] = [
    {"prompt": "ab", "chosen": "c", "rejected": ["d", "e"], "weight": 0.5},
    {"chosen": "abc", "rejected": "abd", "tools": '[{"type": "function"}]'},
    {"prompt": "a", "chosen": "b", "rejected": "c", "ref_chosen_logps": -1.5}
    | {"ref_rejected_logps": -2},
    {
        "prompt": [says("system", "s"), says("user", PARTS)],
        "chosen": [says("assistant", "b", loss_weight=0), says("user", "x")]
        + [says("assistant", "c")],
        "rejected": [[says("assistant", "d")], [says("assistant", "e")]],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "chat_template_kwargs": {"date_string": "x"},
    },
    {
        "chosen": [says("user", "a"), says("assistant", "b")],
        "rejected": [says("user", "a"), says("assistant", "c")],
    },
    {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
        ]
        + [{"from": "human", "value": "c"}],
        "chosen": {"from": "gpt", "value": "d"},
        "rejected": {"from": "function_call", "value": '{"name": "f"}'},
        "system": "s",
    },
    {
        "chosen_messages": [says("user", "a"), says("assistant", "b")],
        "rejected_messages": [says("user", "a"), says("assistant", "c")],
    },
    {"prompt_ids": [1, 50], "chosen_ids": [60], "rejected_ids": [[61], [62]]},
    {
        "prompt_input_ids": [1, 50],
        "chosen_input_ids": [60, 0],
        "rejected_input_ids": [61],
        "prompt_attention_mask": [1, 1],
        "chosen_attention_mask": [1, 0],
        "rejected_attention_mask": [1],
    },
]
VALUES = JSON | st.binary(max_size=4) | st.tuples(TEXT) | st.builds(set)
ANY_ROW = st.one_of(
    st.sampled_from(ROWS).flatmap(lambda row: mutated(row, VALUES)),
    st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5),
    *(st.fixed_dictionaries(dict.fromkeys(form.needs, VALUES)) for form in FORMS),
)
TOKENIZERS = {
    "with a template": tiny_tokenizers.make(adds_bos=True),
    "without": tiny_tokenizers.make(template=None, eos=None, bos=None),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@given(ANY_ROW.filter(lambda row: isinstance(row, dict)))
@examples(100)
def test_fuzz_the_forms_of_a_row(row):
    found = one_line_or_success(read_pairs, row, "a.jsonl, row 3")
    if isinstance(found, str):
        assert found.startswith("a.jsonl, row 3")


@given(
    # Behind rows that are right, so that more than the first of all is looked at.
    st.tuples(st.lists(st.sampled_from(ROWS), max_size=3), ANY_ROW),
    st.sampled_from(list(TOKENIZERS)),
    st.sampled_from(["completion", "assistant", "last_turn"]),
)
@examples(75)
def test_fuzz_rows_given_from_python(rows, tokenizer, score):
    def work():
        before, last = rows
        found = as_rows([*before, last])
        pairs = encode_pairs(found, TOKENIZERS[tokenizer], LIMITS, score)
        return with_columns(pairs, found)

    found = one_line_or_success(work)
    if isinstance(found, str):
        assert found.startswith(("the data set", "none of the "))


def consumed(rows: Iterable[dict[str, Any]], score: str = "completion") -> int:
    """Reads rows of a file as training does, tokens too."""
    number = 0
    for row in rows:
        number += len(read_pairs(row, f"a.file, row {number}"))
    return number


def json_like(rows: list[Any]) -> bytes:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    return "\n".join(lines).encode(errors="surrogatepass")


JSON_ROW = st.sampled_from(ROWS).flatmap(mutated)
JSON_TEXT = st.one_of(
    st.lists(JSON_ROW, max_size=3).map(json_like),
    st.lists(JSON_ROW, max_size=3).map(lambda rows: json_like([rows])),
    st.binary(max_size=30),
)


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes that may be cut off, or have others among them."""
    data = draw(whole)
    if data and draw(st.booleans()):
        at = draw(st.integers(0, len(data)))
        middle = draw(st.binary(max_size=2))
        data = data[:at] + draw(st.sampled_from([middle + data[at:], middle]))
    return data


@given(damaged(JSON_TEXT), st.booleans())
@examples(100)
def test_fuzz_files_of_json(folder, data, streamed):
    path = folder / "a.jsonl"
    path.write_bytes(data)

    def work():
        return consumed(json_rows(str(path), "a.file", streamed=streamed))

    found = one_line_or_success(work)
    if isinstance(found, str):
        assert found.startswith("a.file")


def as_csv(table: list[list[str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows(table)
    return text.getvalue().encode(errors="surrogatepass")


CELLS = st.one_of(TEXT, JSON.map(json.dumps), st.sampled_from(FIELDS))
HEADERS = st.sampled_from([list(row) for row in ROWS])
TABLES = st.one_of(
    st.lists(st.lists(CELLS, max_size=4), max_size=4),
    HEADERS.flatmap(
        lambda header: st.lists(
            st.lists(CELLS, min_size=len(header), max_size=len(header)), max_size=3
        ).map(lambda rows: [header, *rows])
    ),
).map(as_csv)


@given(damaged(TABLES))
@examples(100)
def test_fuzz_files_of_csv(folder, data):
    path = folder / "a.csv"
    path.write_bytes(data)
    found = one_line_or_success(lambda: consumed(csv_rows(str(path), "a.file")))
    if isinstance(found, str):
        assert found.startswith("a.file")


PIECES = (
    "{{|}}|{% for m in messages %}|{% endfor %}|{{ m['content'] }}|{{ m.role }}|"
    "{% if m.role == 'user' %}|{% else %}|{% endif %}|{{ raise_exception('x') }}|"
    "{{ 1/0 }}|{% generation %}|{% endgeneration %}|{{ messages[9].x.y }}|{{ none+1 }}"
    "|{{ range(10 ** 9) }}|{{ messages | tojson }}|{% include 'x' %}|{{ eos_token }}"
    "|{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}|{{ messages.__class__ }}|"
    "{{ 'a' * 3 }}|{{ strftime_now('%d') }}|{% if add_generation_prompt %}|a:|{%|%}|{#"
).split("|")
CHATS = [row for row in ROWS if not isinstance(row.get("chosen", 0), int | str)]


TEMPLATES = st.lists(st.sampled_from(PIECES) | TEXT, max_size=6).map("".join)


@given(
    TEMPLATES | TEMPLATES.map("{{% for m in messages %}}{}{{% endfor %}}".format),
    st.sampled_from(CHATS),
    st.sampled_from(["completion", "assistant", "last_turn"]),
)
@examples(50)
def test_fuzz_chat_templates(template, row, score):
    tokenizer = tiny_tokenizers.make(template=template)
    rows = as_rows([row])
    found = one_line_or_success(encode_pairs, rows, tokenizer, LIMITS, score)
    if isinstance(found, str):
        assert found.startswith(("the data set, row 0", "none of the "))
