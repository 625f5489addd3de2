"""Chat templates: parts of text, words that a template loses, and today's date."""

import datetime
import types

import numpy as np
import pytest
from transformers.utils import chat_template_utils

from engine.data import templates
from engine.data.pairs import tokenize_pairs
from engine.data.templates import ChatTemplate
from engine.errors import InputError
from tests.engine.tiny_tokenizers import make

TURN = "{% for m in messages %}{{ m['role'][0] }}:"
END = "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
# How templates in use write content: each loses parts, or not, in a way of its own.
AS_IT_IS = TURN + "{{ m['content'] }}" + END
TRIMMED = TURN + "{{ m['content'] | trim }}" + END
TEXT_ONLY = TURN + "{{ m['content'] if m['content'] is string else '' }}" + END
WALKING = (
    TURN
    + "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    + "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}"
    + END
)
SPACED = WALKING.replace("{{ p['text'] }}", "{{ p['text'] }}_")
FIRST_PART = (
    TURN + "{{ m.content if m.content is string else m.content[0].text }}" + END
)
NO_TEXT = (
    TURN
    + "{% if m['content'] is not string %}{% for p in m['content'] %}"
    + "{{ p['text'] }}{% endfor %}{% endif %}"
    + END
)


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


def turn(role: str, content, **more) -> list[dict]:
    return [{"role": role, "content": content, **more}]


def row(question, chosen, rejected, **more) -> dict:
    return {
        "prompt": turn("user", question),
        "chosen": turn("assistant", chosen, **more),
        "rejected": turn("assistant", rejected),
    }


def texts(template: str, *rows: dict) -> list[str]:
    """Each sequence's text: chosen, rejected, chosen, ..."""
    tokenizer = make(template=template)
    pairs = tokenize_pairs(list(rows), tokenizer, max_length=None)
    bounds = zip(pairs.offsets[:-1], pairs.offsets[1:], strict=True)
    return [str(tokenizer.decode(pairs.tokens[a:b])) for a, b in bounds]


def refusal(template: str, *rows: dict) -> str:
    with pytest.raises(InputError) as caught:
        texts(template, *rows)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- parts of text


@pytest.mark.parametrize(
    "template", [AS_IT_IS, TRIMMED, TEXT_ONLY, WALKING, FIRST_PART]
)
def test_parts_are_rendered_as_their_text(template):
    plain = row("Tea?", "Green.", "Black, please.")
    in_parts = row(parts("Te", "a?"), parts("Green."), parts("Black, ", "please."))
    expected = ["u:Tea?\na:Green.\n", "u:Tea?\na:Black, please.\n"]
    assert texts(template, plain, in_parts) == 2 * expected


def test_a_template_that_walks_over_parts_decides_what_is_between_them():
    in_parts = row(parts("Te", "a?"), parts("Green."), parts("Bl", "ack."))
    assert texts(SPACED, in_parts) == [
        "u:Te_a?_\na:Green._\n",
        "u:Te_a?_\na:Bl_ack._\n",
    ]


@pytest.mark.parametrize("part", [{"type": "text"}, {"type": "text", "text": 3}])
def test_a_part_without_text_is_refused(part):
    said = refusal(AS_IT_IS, row("Tea?", [part], "Black."))
    assert said.startswith(
        "the data set, row 0 (counting from 0), field 'chosen', mess"
    )
    assert '{"type": "text", "text": text}' in said


# ---------------------------------------------------------------- words that are lost


THINKING = TURN + "{{ m['content'].split('</think>')[-1] }}" + END
LAST_ONLY = (
    "{% for m in messages %}{{ m['role'][0] }}:"
    "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}\n{% "
    "endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
SHORT = TURN + "{{ m['content'] | truncate(12, true, '', 0) }}" + END
ESCAPED = TURN + "{{ m['content'] | tojson }}" + END


@pytest.mark.parametrize(
    "template, answer, lost",
    [
        (THINKING, "<think>\nA leaf\n</think>\n\nGreen.", "<think>"),
        (THINKING, "<think>leaf</think>Green.", "<think>"),
        (SHORT, "Green tea, of course.", "tea,"),  # marks take room, too
        (AS_IT_IS, {"reasoning_content": "A leaf."}, "A"),
        (AS_IT_IS, {"tool_calls": [{"function": {"name": "brew"}}]}, "brew"),
    ],
)
def test_an_answer_of_which_the_template_leaves_words_out(template, answer, lost):
    content, more = (answer, {}) if isinstance(answer, str) else ("Green.", answer)
    good = row("Tea?", "Ok.", "No.")
    said = refusal(template, good, row("Tea?", content, "No.", **more))
    assert said.startswith(
        "the data set, row 1 (counting from 0), field 'chosen': the tokenizer's chat "
        "template leaves "
    )
    assert f"leaves {lost!r} out, so that the model would never see it" in said


def test_an_earlier_turn_of_an_answer_that_is_left_out():
    answer = [
        *turn("assistant", "Green?"),
        *turn("user", "Yes"),
        *turn("assistant", "So"),
    ]
    rows = {"prompt": turn("user", "Tea?"), "chosen": answer}
    said = refusal(LAST_ONLY, rows | {"rejected": turn("assistant", "Black.")})
    assert "field 'chosen': the tokenizer's chat template leaves 'Green?' out" in said


@pytest.mark.parametrize(
    "template, answer",
    [
        (ESCAPED, 'He said "tea"\n<leaf>'),  # other characters, but the same words
        (TRIMMED, "  Green. \n"),
        (AS_IT_IS, ""),
        (AS_IT_IS, "<think>\nA leaf\n</think>\n\nGreen."),
        (AS_IT_IS, "Tea?"),  # stands in the prompt, too
        # Shown in a notation of its own.
        (AS_IT_IS + "{{ messages[-1].tool_calls | default('') | tojson }}", "brew"),
    ],
)
def test_an_answer_that_is_whole(template, answer):
    calls = [{"type": "function", "function": {"name": "b", "arguments": '{"a": "b"}'}}]
    more = {"tool_calls": calls} if "tool_calls" in template else {}
    assert len(texts(template, row("Tea?", answer, "No.", **more))) == 2


def test_an_answer_that_only_the_prompt_has_is_missed():
    said = refusal(LAST_ONLY.replace("loop.last or ", ""), row("Tea?", "Tea?", "No."))
    assert "field 'chosen': the tokenizer's chat template leaves 'Tea?' out" in said


FIRST_SYSTEM_PART = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content[0].text }}|{% endif %}"
    + WALKING.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
)
NO_SYSTEM = (
    TURN.replace("%}", "if m['role'] != 'system' %}", 1) + "{{ m['content'] }}" + END
)
SYSTEM_LAST = NO_SYSTEM + "{{ messages[0].content if messages[0].role == 'system' }}"


@pytest.mark.parametrize(
    "template, lost",
    [
        (FIRST_SYSTEM_PART, "Be"),
        (NO_SYSTEM, "I"),
        (NO_TEXT, "I"),
        (SYSTEM_LAST, None),
    ],
)
def test_words_of_the_prompt_that_are_left_out(template, lost):
    system = turn("system", parts("I serve. ", "Be brief."))
    if template != FIRST_SYSTEM_PART:
        system = turn("system", "I serve. Be brief.")
    asked = row("Tea?", "Green.", "Black.")
    asked["prompt"] = system + asked["prompt"]
    if lost is None:
        assert texts(template, asked)[0].endswith("I serve. Be brief.")
        return
    said = refusal(template, asked)
    assert f"field 'prompt': the tokenizer's chat template leaves {lost!r} out" in said


def test_reasoning_of_earlier_answers_may_be_left_out():
    asked = row("Tea?", "Green.", "Black.")
    asked["prompt"] = [
        *turn("user", "Hi"),
        *turn("assistant", "<think>so</think>Hello"),
        *asked["prompt"],
    ]
    assert texts(THINKING, asked)[0] == "u:Hi\na:Hello\nu:Tea?\na:Green.\n"


# ---------------------------------------------------------------- half characters


@pytest.mark.parametrize(
    "data, field",
    [
        ({"prompt": "p", "chosen": "a\ud83d", "rejected": "b"}, "chosen"),
        ({"prompt": "\udc00p", "chosen": "a", "rejected": "b"}, "prompt"),
        (row("Tea?", "Green.", parts("Bl\ud83d", "ack.")), "rejected"),
    ],
)
def test_half_a_character_is_named(data, field):
    said = refusal(AS_IT_IS, row("Tea?", "Green.", "Black."), data)
    assert said.startswith(
        f"the data set, row 1 (counting from 0), field {field!r}, has half a character"
    )
    assert said.isascii()


# ---------------------------------------------------------------- today's date


DATED = "{{ strftime_now('%d %b %Y, %-d.%-m. %H:%M %% %A') }}\n" + AS_IT_IS
NAMED = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}"
    "{{ date_string }}|" + AS_IT_IS
)


@pytest.fixture
def clock(monkeypatch):
    """The day that transformers tells templates."""

    clock = types.SimpleNamespace()
    monkeypatch.setattr(chat_template_utils, "datetime", clock)
    return clock


def test_tokens_do_not_depend_on_the_day(clock, tmp_path):
    rows = [row("Tea?", "Green.", "Black.")]
    found = []
    for day in (9, 10):
        clock.now = lambda day=day: datetime.datetime(2031, 3, day)
        tokenizer = make(template=DATED)
        plain = tokenizer.apply_chat_template(rows[0]["prompt"], tokenize=False)
        assert f"{day:02} Mar 2031" in str(plain)  # the clock is what a template reads
        found.append(
            tokenize_pairs(
                rows, tokenizer, max_length=None, cache_dir=tmp_path / str(day)
            )
        )
    np.testing.assert_array_equal(found[0].tokens, found[1].tokens)
    expected = "26 Jul 2024, 26.7. 00:00 % Friday\nu:Tea?\na:Green.\n"
    assert texts(DATED, *rows)[0] == expected


def test_a_row_may_set_the_date():
    rows = [row("Tea?", "Green.", "Black.")] * 2
    rows[1] = rows[1] | {"chat_template_kwargs": {"date_string": "1 May"}}
    first, _, second, _ = texts(NAMED, *rows)
    assert first.startswith("26 Jul 2024|u:") and second.startswith("1 May|u:")


def test_the_date_is_formatted_as_python_does():
    form = " ".join(f"%{c}" for c in "aAbBcdfHIjmMpSUwWxXyYGuV") + " %-d %-m %-H %%d"
    template = f"  {{{{ strftime_now(format='{form}') }}}}\n x"
    text = ChatTemplate(make(template=template)).render(turn("user", "Tea?"))
    assert text == f"  {templates.FIXED_DATE.strftime(form)}\n x"


def test_a_macro_of_the_template_may_ask_for_the_date():
    template = (
        "{% macro today() %}{{ strftime_now('%Y') }}{% endmacro %}"
        "{% for m in messages %}{{ today() }}{{ m['content'] }}{% endfor %}"
    )
    text = ChatTemplate(make(template=template)).render(turn("user", "Tea?"))
    assert text == "2024Tea?"


def test_the_date_is_told_once(caplog):
    texts(DATED, *[row("Tea?", "Green.", "Black.")] * 3)
    told = [r.getMessage() for r in caplog.records if "date" in r.getMessage()]
    assert len(told) == 1 and "it is told 26 Jul 2024 in every run" in told[0]
    caplog.clear()
    texts(AS_IT_IS, row("Tea?", "Green.", "Black."))
    assert not caplog.records


@pytest.mark.parametrize("how", ["upper", "lower", "title"])
def test_a_template_that_changes_case_says_so(how):
    template = AS_IT_IS.replace("{{ m['content'] }}", f"{{{{ m['content'] | {how} }}}}")
    with pytest.raises(InputError) as caught:
        tokenize_pairs(
            [row("Tea or cOffee", "Yes", "No")],
            make(template=template),
            max_length=None,
        )
    assert "chat template changes the case of letters in '" in str(caught.value)
    assert "field 'prompt'" in str(caught.value)
