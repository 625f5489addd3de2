"""Columns that files call otherwise than we do."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from engine.config.columns import ColumnsConfig
from engine.config.run import MixtureConfig, SourceConfig
from engine.data.columns import FIELDS
from engine.data.forms import read_pairs
from engine.data.pairs import load_mixture, tokenize_pairs
from engine.errors import InputError
from tests.engine.tiny_tokenizers import make

ROW = {"question": "p", "answer_good": "c", "rejected": "r", "chosen": "not this"}
COLUMNS = {"prompt": "question", "chosen": "answer_good"}
WANT = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.fixture(autouse=True)
def in_a_folder_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(json.dumps(ROW))
    Path("a.csv").write_text(f"{','.join(ROW)}\n{','.join(ROW.values())}\n")
    Dataset.from_list([ROW]).to_parquet("a.parquet")
    Dataset.from_list([ROW]).save_to_disk("saved")
    Path("folder").mkdir()
    Path("folder/train.jsonl").write_text(json.dumps(ROW))


def rows(file: str, **columns: str) -> list[dict]:
    names = ColumnsConfig(**columns)  # pyright: ignore[reportArgumentType]
    source = SourceConfig(data_files=file, columns=names)
    found = load_mixture(MixtureConfig(informs=(source,)))
    return [row for _, batch in found.batches(10) for row in batch]


FILES = ["a.jsonl", "a.csv", "a.parquet", "saved", "folder"]


@pytest.mark.parametrize("file", FILES)
def test_columns_are_read_under_the_names_given(file):
    assert rows(file, **COLUMNS) == [WANT]
    with pytest.raises(InputError) as caught:
        rows(file, chosen="answer_god")
    said = str(caught.value)
    assert (
        "has no column 'answer_god', which columns.chosen names; did you mean" in said
    )
    assert "it has question, answer_good, rejected, chosen" in said
    assert f"{file}/train.jsonl" in said if file == "folder" else said.startswith(file)
    # Without names: what is meant is seen, and how to say so.
    with pytest.raises(InputError, match=r"\(columns: {prompt: question}\)"):
        rows(file)


def test_two_columns_change_places():
    assert rows("a.jsonl", chosen="rejected", rejected="chosen", prompt="question") == [
        {"prompt": "p", "chosen": "r", "rejected": "not this"}
    ]


def test_every_file_must_have_them():
    Path("b.jsonl").write_text(json.dumps(WANT))
    source = SourceConfig(
        data_files=("a.jsonl", "b.jsonl"), columns=ColumnsConfig(**COLUMNS)
    )
    with pytest.raises(InputError, match="^b.jsonl has no column 'question'"):
        load_mixture(MixtureConfig(informs=(source,)))


def test_a_column_that_no_row_would_use_is_refused():
    Path("c.jsonl").write_text(json.dumps(WANT | {"sys": "Be kind."}))
    with pytest.raises(InputError, match="columns.system='sys' has no effect without"):
        rows("c.jsonl", system="sys")


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"prompt": ""}, "prompt='' must not be empty"),
        ({"prompt": "a", "chosen": "a"}, "chosen='a' is what prompt names, too"),
    ],
)
def test_names_that_mean_nothing(columns, message):
    with pytest.raises(InputError, match=message):
        ColumnsConfig(**columns)


def test_every_name_is_one_that_is_read():
    assert set(vars(ColumnsConfig())) <= set(FIELDS)


def test_a_key_twice_is_seen_under_the_file_s_own_name():
    Path("a.jsonl").write_text('{"question": "a", "question": "b", "chosen": "c"}')
    with pytest.raises(InputError, match="has the key 'question' twice"):
        rows("a.jsonl", prompt="question")


def test_sources_of_two_forms_in_one_mixture(monkeypatch, tmp_path):
    """Each under its own names; drawn by weight."""
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    turns = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "p"}]
    shared = {"conversations": turns, "chosen": "c", "rejected": ["r", "s"]}
    Path("shared.json").write_text(json.dumps([shared] * 3))
    Path("a.jsonl").write_text("\n".join([json.dumps(ROW)] * 4))
    sources = (
        SourceConfig(data_files="a.jsonl", columns=ColumnsConfig(**COLUMNS)),
        SourceConfig(data_files="shared.json"),
    )
    mixture = MixtureConfig(informs=sources, mixture_weights=(2, 1))
    found = load_mixture(mixture)
    counts = [
        len(read_pairs(row, "row")) for _, some in found.batches(9) for row in some
    ]
    assert sorted(counts) == [1, 1, 1, 1, 2, 2]
    pairs = tokenize_pairs(found, make(), max_length=None)
    assert np.bincount(pairs.rows).tolist() == counts
