"""What is asked of a hub, and what is read of its files; no hub is there."""

import json
import logging
import types

import datasets
import pytest
from datasets import Dataset

from engine.config.run import MixtureConfig, SourceConfig
from engine.data.pairs import load_mixture
from engine.errors import InputError

ROWS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(10)]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(data_files, **options):
    source = SourceConfig(data_files=data_files, **options)
    return load_mixture(MixtureConfig(informs=(source,), cache_dir="cache"))


class Builder:
    """What `datasets` says of a hub's data set: its kind, and its files by split."""

    def __init__(self, kind: str, **files: list[str]):
        self.name = kind
        self.config = types.SimpleNamespace(data_files=files)


@pytest.fixture
def asked(monkeypatch):
    """What `datasets` is asked for, in place of a hub."""
    asked = []
    builder = Builder("parquet", train=["hf://datasets/someone/pairs/a.parquet"])

    def find(*args, **options):
        asked.append(("find", args, options))
        return builder

    def load(*args, **options):
        asked.append(("load", args, options))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset_builder", find)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked, builder


@pytest.mark.parametrize("kind", ["parquet", "cache"])
def test_a_hub_id_is_asked_for_by_name_subset_and_split(asked, kind):
    calls, builder = asked
    builder.name = kind
    load("someone/pairs", type="hf", split="train[:90%]", dataset_split_name="subset")
    options = {"name": "subset", "cache_dir": "cache"}
    assert calls == [
        ("find", ("someone/pairs",), options),
        ("load", ("someone/pairs",), options | {"split": "train[:90%]"}),
    ]


def test_text_files_of_a_hub_are_downloaded_and_read_to_the_letter(asked, monkeypatch):
    with open("copy", "w") as file:
        json.dump({**ROWS[0], "chosen": "2024-01-31"}, file)
    calls, builder = asked
    url = "hf://datasets/someone/pairs/a.jsonl"
    builder.name, builder.config.data_files = (
        "json",
        {"train": [url], "test": [f"{url}x"]},
    )
    seen = []

    def download(self, file):
        seen.append(file)
        return "copy"

    monkeypatch.setattr(datasets.DownloadManager, "download_and_extract", download)
    (_, rows), *_ = load("someone/pairs").batches(9)
    assert rows == [{**ROWS[0], "chosen": "2024-01-31"}]
    assert seen == [url] and [call[0] for call in calls] == ["find"]


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def fake(*args, **options):
        raise ConnectionError("Couldn't reach 'a/b' on the Hub (offline)\nTraceback")

    monkeypatch.setattr(datasets, "load_dataset_builder", fake)
    with pytest.raises(InputError) as caught:
        load("a/b")
    assert str(caught.value) == (
        "a/b cannot be read as a hub id, and is no folder here: "
        "Couldn't reach 'a/b' on the Hub (offline)"
    )


def test_without_a_network_two_lines_are_all(monkeypatch, caplog):
    """The library has one for each of its tries."""
    library = logging.getLogger("huggingface_hub.utils._http")

    def find(*args, **options):
        library.warning("Retrying in 8s [Retry 5/5].")
        raise ConnectionError("Couldn't reach 'someone/pairs' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", find)
    level = library.getEffectiveLevel()
    with (
        caplog.at_level(logging.INFO, logger="engine"),
        pytest.raises(InputError, match="someone/pairs cannot be read as a hub id"),
    ):
        load("someone/pairs", type="hf")
    assert caplog.messages == ["asking the hub for someone/pairs ..."]
    assert library.getEffectiveLevel() == level
