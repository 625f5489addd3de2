"""What libraries raise becomes one line, in one place; our own defects do not."""

import datasets
import pyarrow as pa
import pytest
import yaml
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerFast

from engine.data.pairs import tokenize_pairs
from engine.data.stages import reading
from engine.errors import InputError
from tests.engine.tiny_tokenizers import make


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


MIXED = (
    "its files, or rows, have columns of different types; give each type of file an "
    "entry of its own in informs, by data_files"
)


@pytest.mark.parametrize(
    "error, reason",
    [
        (ConnectionError("No route\nto the hub"), "No route"),
        (ImportError("It requires 'aiohttp'"), "It requires 'aiohttp'"),
        (KeyError("config"), "there is no 'config'"),
        (StopIteration(), "StopIteration"),
        (pa.ArrowInvalid("Not a Parquet file"), "Not a Parquet file"),
        (
            caused(DatasetGenerationError("An error"), ValueError("Bad magic number")),
            "Bad magic number",
        ),
        (
            ValueError("BatchSize must be greater than 0"),
            "one of its files has no rows; leave it out",
        ),
        (TypeError("Couldn't cast array of type list<item: string> to string"), MIXED),
        (ValueError("Couldn't cast\nprompt: string\nto\n{...}"), MIXED),
        (
            yaml.YAMLError("mapping values\nare not allowed"),
            "its data card, README.md, is no valid YAML (mapping values are not "
            "allowed)",
        ),
        (
            ValueError('Instruction "test" corresponds to no data!'),
            "the split that is asked for holds no rows; name another in split",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one: ['a', 'b']"),
            "it holds several data sets; name one in dataset_split_name (Please pick "
            "one: ['a', 'b'])",
        ),
        (OSError("x" * 1000), "x" * 300 + "..."),
    ],
)
def test_reading(error, reason):
    with pytest.raises(InputError) as caught:
        with reading("pairs cannot be read"):
            raise error
    assert str(caught.value) == f"pairs cannot be read: {reason}"
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [InputError("ours"), MemoryError(), AssertionError()])
def test_what_is_passed_on(error):
    bars = datasets.are_progress_bars_disabled()
    with pytest.raises(type(error)) as caught:
        with reading("pairs cannot be read"):
            assert datasets.are_progress_bars_disabled()
            raise error
    assert caught.value is error
    assert datasets.are_progress_bars_disabled() == bars


def test_a_tokenizer_that_fails(monkeypatch, tmp_path):
    encode = PreTrainedTokenizerFast.__call__

    def fail(self, texts, **options):
        if len(texts) > 1:
            raise OverflowError("int too big\nto convert")
        return encode(self, texts, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", fail)
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 3
    with pytest.raises(InputError) as caught:
        tokenize_pairs(rows, make(), max_length=None, cache_dir=tmp_path)
    assert str(caught.value) == (
        "the data set, row 0 (counting from 0), and the 2 rows after it: the tokenizer "
        "cannot encode them (int too big to convert); correct the rows, or name "
        "another "
        "tokenizer"
    )
