"""Which tokens of an answer are scored: its turns, and what a loss_weight of 0 says."""

import typing

import numpy as np
import pytest

from engine.data.pair_tokens import Score
from engine.data.pairs import Limits, check_limits, tokenize_pairs
from engine.errors import InputError
from tests.engine.tiny_tokenizers import make

GENERATION = "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
# Turns begin and end with special tokens, and a line break that no turn owns follows.
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
) + GENERATION
# What a model thought is written for the last turn only.
THINKING = (
    "{% for m in messages %}<s>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<t></t>{% endif %}"
    "{{ m['content'] }}</s>\n{% endfor %}"
) + GENERATION
# The conversation as a whole is closed, besides its turns.
CLOSED = CHAT.replace(
    GENERATION, GENERATION.replace("{% endif %}", "{% else %}</s>{% endif %}")
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<s>assistant\n"
    "{% generation %}{{ m['content'] }}</s>\n{% endgeneration %}"
    "{% else %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endif %}{% endfor %}"
) + GENERATION
NO_HEADER = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% else %}<s>{{ m['content'] }} /{% endif %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))


def says(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def row(*chosen: dict) -> dict:
    return {
        "prompt": [says("user", "hi"), says("assistant", "ho"), says("user", "now?")],
        "chosen": list(chosen),
        "rejected": [says("assistant", "no")],
    }


TURNS = (
    says("assistant", "one"),
    says("tool", "got"),
    says("assistant", "two"),
    says("user", "go"),
    says("assistant", "end"),
)


def scored(
    row, template=CHAT, score: Score = "assistant", merges="", max_length=None
) -> list[str]:
    """The texts of the chosen side that are scored, in order."""
    tokenizer = make(template=template, merges=merges)
    pairs = tokenize_pairs([row], tokenizer, max_length=max_length, score=score)
    tokens, marks = (x[: pairs.offsets[1]] for x in (pairs.tokens, pairs.scored))
    edges = np.flatnonzero(np.diff([0, *marks, 0])).reshape(-1, 2)
    return [str(tokenizer.decode(tokens[start:stop])) for start, stop in edges]


def test_all_of_a_completion_its_turns_or_the_last_one():
    whole = "one</s>\n<s>tool\ngot</s>\n<s>assistant\ntwo</s>\n<s>user\ngo</s>\n"
    whole += "<s>assistant\nend</s>\n"
    assert scored(row(*TURNS), score="completion") == [whole]
    assert scored(row(*TURNS)) == ["one</s>", "two</s>", "end</s>"]
    assert scored(row(*TURNS), score="last_turn") == ["end</s>"]


def test_of_plain_text_all_is_the_assistants():
    text = {"prompt": "p", "chosen": "one", "rejected": "two"}
    for score in typing.get_args(Score):
        assert scored(text, score=score) == ["one</s>"]


def test_a_message_of_loss_weight_0_is_not_scored():
    one, tool, two, go, end = TURNS
    some = row(one | {"loss_weight": 0}, tool, two | {"loss_weight": 1.0}, go, end)
    assert scored(some) == ["two</s>", "end</s>"]
    # Of a whole completion the message is left out, with what is written around it.
    some = row(one, tool | {"loss_weight": 0.0}, two, go | {"loss_weight": 0}, end)
    want = ["one</s>\n", "<s>assistant\ntwo</s>\n", "<s>assistant\nend</s>\n"]
    assert scored(some, score="completion") == want
    prompt = [says("user", "now?", loss_weight=0), says("assistant", "x")]
    assert scored(row(end) | {"prompt": prompt}, score="completion") == ["end</s>\n"]


@pytest.mark.parametrize("weight", [0.5, 2, -1, True, "0", float("nan")])
def test_another_loss_weight_is_refused(weight):
    bad = row(TURNS[0], TURNS[1] | {"loss_weight": weight})
    with pytest.raises(InputError) as caught:
        scored(bad, score="completion")
    start = "the data set, row 0 (counting from 0), field 'chosen', message 1, field "
    assert str(caught.value).startswith(f"{start}'loss_weight', is {weight!r}; it must")


def test_what_nothing_is_scored_of_is_dropped(caplog):
    silent = row(says("assistant", "one", loss_weight=0))
    found = tokenize_pairs([row(*TURNS), silent], make(template=CHAT), max_length=None)
    assert len(found) == 1 and found.dropped == 1
    assert found.drops == (("nothing to score", 1, 1),)
    assert "and one of its messages another loss_weight than 0" in caplog.text
    with pytest.raises(InputError, match="none of the 1 pairs"):
        scored(row(*TURNS), score="last_turn", max_length=60)


@pytest.mark.parametrize("score", ["assistant", "last_turn"])
def test_an_answer_without_an_assistant_is_refused(score):
    with pytest.raises(
        InputError, match="row 0 .* 'chosen', has no message of the rol"
    ):
        scored(row(says("user", "a")), score=score)


def test_a_template_that_rewrites_history():
    """The words of a turn, and its end, must stand where they are looked for."""
    turns = TURNS[2:]
    assert scored(row(*turns), THINKING) == ["two</s>", "<t></t>end</s>"]
    weighted = row(turns[0], turns[1] | {"loss_weight": 0}, turns[2])
    want = ["two</s>\n", "<s>assistant\n<t></t>end</s>\n"]
    assert scored(weighted, THINKING, score="completion") == want
    assert scored(row(*turns), CLOSED) == ["two</s>", "end</s>\n</s>"]


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ messages | length }}" + CHAT, "writes earlier messages otherwise ('3<s>"),
        (CHAT.replace(GENERATION, ""), "has no generation prompt to compare with; use"),
        (
            THINKING.replace("</s>\n{%", "{{ '</s>' if loop.last else '<unk>' }}\n{%"),
            "writes earlier messages otherwise ('/s>\\n' becomes 'unk>\\n<s>a",
        ),
    ],
    ids=["counting", "no generation prompt", "another end"],
)
def test_what_cannot_be_told_is_refused(template, message):
    with pytest.raises(InputError) as caught:
        scored(row(*TURNS[2:]), template)
    said = str(caught.value)
    assert said.startswith("the data set, row 0 (counting from 0), field 'chosen': ")
    assert message in said and len(said) < 400 and "\n" not in said


def test_a_template_without_headers():
    assert scored(row(*TURNS[2:]), NO_HEADER) == [" two</s>", " end</s>"]


def test_tokens_that_merge_over_the_edges_of_a_turn():
    # The header's last letter is in a token with the first of the first word.
    spaced = CHAT.replace("assistant\n", "assistant:").replace(
        "m['role'] }}\n", "m['role'] }}:"
    )
    merged = scored(row(*TURNS[2:]), spaced, merges=":t :e")
    assert merged == [":two</s>", ":end</s>"]
    ends = CHAT.replace("</s>\n{% endfor %}", "\n{% endfor %}").replace("<s>", "")
    assert scored(row(*TURNS[2:]), ends) == ["two\n", "end\n"]
    ends = ends.replace("\n{% endfor %}", ";{% endfor %}")
    with pytest.raises(InputError, match="a token reaches over its end"):
        scored(row(*TURNS[2:]), ends, merges=";u")


def test_the_marks_of_a_template_are_its_turns():
    tokenizer = make(template=MARKED)
    data = row(*TURNS)
    found = tokenizer.apply_chat_template(
        data["prompt"] + data["chosen"],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    pairs = tokenize_pairs([data], tokenizer, max_length=None, score="assistant")
    end, start = pairs.offsets[1], pairs.completion_start[0]
    want = np.array(found["assistant_masks"], bool)  # pyright: ignore
    np.testing.assert_array_equal(pairs.scored[start:end], want[start:])
    assert scored(data, MARKED) == ["one</s>\n", "two</s>\n", "end</s>\n"]
    assert scored(data, MARKED, score="last_turn") == ["end</s>\n"]
    weighted = row(TURNS[0] | {"loss_weight": 0}, *TURNS[1:])
    assert scored(weighted, MARKED) == ["two</s>\n", "end</s>\n"]
    # One that marks the header, too; and one that marks not every turn.
    header = MARKED.replace("<s>assistant\n{% generation %}", "{% generation %}<s>")
    header = header.replace(
        "%}<s>{{ m['content']", "%}<s>assistant\n{{ m['content']", 1
    )
    assert scored(data, header) == ["one</s>\n", "two</s>\n", "end</s>\n"]
    some = MARKED.replace("['role'] == 'assistant'", "['content'] == 'one'")
    with pytest.raises(
        InputError, match=r"marks 1 texts \({% generation %}\) in a conv"
    ):
        scored(data, some)


def test_another_choice_is_another_file(tmp_path):
    def count(**options):
        template = CHAT.replace("{% for", "{{ tools or '' }}{% for", 1)
        tokenizer = make(template=template)
        pairs = tokenize_pairs(
            [row(*TURNS)], tokenizer, max_length=None, cache_dir=tmp_path, **options
        )
        return int(pairs.num_scored.sum()), len(pairs.tokens)

    for _ in range(2):
        whole, turns, last = (
            count(score=x) for x in ("completion", "assistant", "last_turn")
        )
        assert whole > turns > last
        assert count(tools=[{"name": "f"}])[1] > whole[1]
    assert len(list((tmp_path / "tokens").iterdir())) == 4


def test_tokens_keep_what_is_scored_of_them():
    pairs = tokenize_pairs(
        [row(*TURNS)], make(template=CHAT), max_length=None, score="assistant"
    )
    limits = Limits(None, None, None, "keep_start")
    check_limits(pairs, limits, "assistant")
    with pytest.raises(
        InputError, match="score='completion' has no effect on data tha"
    ):
        check_limits(pairs, limits)
    with pytest.raises(
        InputError, match="tools has no effect on data that is tokenise"
    ):
        check_limits(pairs, limits, "assistant", [{}])
