"""Libraries' exceptions become one line; our own mistakes stay as they are."""

import json

import numpy as np
import pytest

from engine.data.batches import check_distinct
from engine.errors import InputError, stage
from engine.parallel.batch import ScoredTokens


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


def test_our_own_mistakes_keep_their_traceback():
    twice = np.zeros((1, 1, 2), np.int32)
    with pytest.raises(AssertionError, match="scored twice"), stage("x"):
        check_distinct(ScoredTokens(twice, twice, np.array([[[2]]], np.int32)))
    with pytest.raises(KeyboardInterrupt), stage("x"):
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="^mine$"), stage("x"):
        raise InputError("mine")


def test_dpo_traceback_shows_everything(monkeypatch):
    monkeypatch.setenv("DPO_TRACEBACK", "1")
    with pytest.raises(json.JSONDecodeError), stage("cannot read x.json"):
        json.loads("{")
