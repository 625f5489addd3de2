"""Warnings of BOS, of ends that are not marked, of templates without a header."""

import json

import pytest

from engine.data.pair_tokens import Limits
from engine.data.rows import as_rows
from engine.data.tokenization import encode_rows
from engine.inspection.checks import Findings, check_tokens, form_of, stop_ids
from tests.engine.tiny_tokenizers import EOS, TEMPLATE, make

NO_LIMIT = Limits(None, None, None, "keep_start")
CLOSED = TEMPLATE.replace("\n{% endfor", "{{ eos_token }}\n{% endfor")


def turns(prompt: str, chosen: str, rejected: str) -> dict:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def check(rows, limits=NO_LIMIT, stops=(EOS,), **options) -> Findings:
    tokenizer = make(**options)
    rows = as_rows(rows)
    pairs = encode_rows(rows, tokenizer, limits)
    return check_tokens(tokenizer, rows, pairs, stops, form_of(rows))


def text(prompt: str, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_a_sound_template_and_sound_text():
    assert check([turns("p", "a", "b")], template=CLOSED) == Findings([], [])
    assert check([text("p", "a", "b")], template=None) == Findings([], [])
    # What is cut cannot end.
    short = NO_LIMIT._replace(max_completion_length=1)
    assert check([turns("p", "aa", "bb")], short, template=CLOSED) == Findings([], [])


def test_a_template_that_does_not_end_an_answer():
    (warning,) = check([turns("p", "a", "b")] * 3).warnings
    assert warning.startswith("3 of 3 pairs (the first: the data set, row 0 (counting")
    assert "('</s>'), so that the model does not learn to stop" in warning
    # The end of a turn ends generation, if the model's files say so.
    assert check([turns("p", "a", "b")], stops=(EOS, ord("\n") + 10)).warnings == []


def test_one_answer_without_an_end():
    template = CLOSED.replace("{{ eos_token }}", "{{ m.get('end', eos_token) }}")
    rows = [turns("p", "a", "b") for _ in range(3)]
    rows[1]["rejected"][0]["end"] = "."
    (warning,) = check(rows, template=template).warnings
    assert warning.startswith("1 of 3 pairs (the first: the data set, row 1 (counting")


def test_a_template_without_a_header_for_the_answer():
    headless = CLOSED.replace("a:{% endif %}", "{% endif %}")
    (warning,) = check([turns("p", "a", "b")], template=headless).warnings
    assert "writes nothing for add_generation_prompt" in warning


def test_bos_twice():
    template = "{{ bos_token }}" + CLOSED
    (warning,) = check([turns("p", "a", "b")], template=template).warnings
    assert "begin with '<s>' twice" in warning


def test_no_bos_where_the_tokenizer_writes_it():
    bare = CLOSED.replace("{{ bos_token }}", "")
    rows = [turns("p", "a", "b")]
    (warning,) = check(rows, template=bare, adds_bos=True).warnings
    assert "do not begin with '<s>'" in warning
    assert check(rows, template=bare).warnings == []
    assert check(rows, template=CLOSED, adds_bos=True).warnings == []


def test_a_bos_that_is_cut_away():
    short = NO_LIMIT._replace(max_length=6, truncation_mode="keep_end")
    rows = [turns("pppp", "aa", "bb")]
    (warning,) = check(rows, short, template=CLOSED, adds_bos=True).warnings
    assert "have lost '<s>' at their start to max_length" in warning


def test_text_for_a_model_with_a_template():
    (warning,) = check([text("p", "a", "b")]).warnings
    assert "the tokenizer's chat template is not used" in warning


def test_an_end_inside_of_an_answer():
    rows = [text("p", "a", "b"), text("</s>p", "a", "b</s>c"), text("p", "a</s>", "b")]
    (warning,) = check(rows, template=None).warnings
    assert warning.startswith("1 of 3 pairs (the first: the data set, row 1 (counting")
    assert "have '</s>' inside an answer" in warning


def test_tokens_for_what_the_vocabulary_does_not_have():
    rows = [text("p", "a", "b"), text("é", "a", "b")]
    (warning,) = check(rows, template=None).warnings
    assert warning.startswith("1 of 2 pairs (the first: the data set, row 1 (counting")
    assert "hold '<unk>'" in warning


def test_padding_that_also_ends_a_text_does_no_harm():
    tokenizer = make(template=None)
    tokenizer.pad_token = "</s>"
    rows = as_rows([text("p", "a", "b")])
    pairs = encode_rows(rows, tokenizer, NO_LIMIT)
    found = check_tokens(tokenizer, rows, pairs, (EOS,), "text")
    assert found.warnings == [] and "this does no harm here" in found.notes[0]


@pytest.mark.parametrize(
    "config, generation, expected",
    [
        (None, None, {EOS}),
        ({"eos_token_id": 7}, None, {EOS, 7}),
        ({"eos_token_id": None}, {"eos_token_id": [7, 8]}, {EOS, 7, 8}),
    ],
)
def test_what_ends_generation(tmp_path, config, generation, expected):
    files = {"config.json": config, "generation_config.json": generation}
    for name, values in files.items():
        if values is not None:
            (tmp_path / name).write_text(json.dumps(values))
    assert stop_ids(make(), tmp_path) == expected
