"""Libraries' exceptions become one line; our own mistakes stay as they are."""

import json

import pytest
import tokenizers

from engine.errors import InputError, shown, stage


def test_what_a_library_raises_is_one_line():
    with pytest.raises(InputError) as caught, stage("cannot read x.json", "mend it"):
        json.loads("{\n oops")
    text = str(caught.value)
    assert text.startswith("cannot read x.json: Expecting property name")
    assert "; mend it" in text and "\n" not in text
    assert isinstance(caught.value.__cause__, json.JSONDecodeError)


def test_what_the_machine_says_is_one_line():
    with pytest.raises(InputError, match="No space left on device"), stage("saving"):
        raise OSError(28, "No space left on device")


def test_what_is_no_exception_by_name_is_one_line(tmp_path):
    """tokenizers raises a plain Exception, from compiled code."""
    path = tmp_path / "tokenizer.json"
    path.write_text('{"version": "9.9", "model": {"type": "Future"}}')
    with pytest.raises(InputError, match="^reading: "), stage("reading"):
        tokenizers.Tokenizer.from_file(str(path))


def test_what_is_passed_on():
    with pytest.raises(AssertionError), stage("x"):
        raise AssertionError
    with pytest.raises(KeyboardInterrupt), stage("x"):
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="^mine$"), stage("x"):
        raise InputError("mine")


def test_dpo_traceback_shows_everything(monkeypatch):
    monkeypatch.setenv("DPO_TRACEBACK", "1")
    with pytest.raises(json.JSONDecodeError), stage("cannot read x.json"):
        json.loads("{")


def test_a_message_is_one_line_that_can_be_seen():
    """Whatever a file's name, a key or a value in it holds."""
    name = "a\nb\x1b[31m \ud83d\u202e\u2028é 漢"
    said = str(InputError(f"{name}: there is none"))
    assert said == r"a b\x1b[31m \ud83d\u202e é 漢: there is none"


def test_values_of_any_size_are_shown():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shown(deep) == "<a list too large to print>"
    assert shown(10**5000) == "<a int too large to print>"
    assert shown("x\n" * 200).endswith("...") and shown(7) == "7"
