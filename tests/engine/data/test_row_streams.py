"""Rows that are streamed: those that are read whole, one after another, none held."""

import bz2
import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset, IterableDatasetDict

from engine.config.columns import ColumnsConfig
from engine.config.run import MixtureConfig, SourceConfig
from engine.data.row_streams import CHUNK, RowStream, stream_rows
from engine.data.rows import as_rows
from engine.data.sources import load_mixture
from engine.data.stream_sources import stream_mixture
from engine.errors import InputError

ROWS = [
    {"prompt": f"p{i}, é", "chosen": f'c"{i}\n', "rejected": f"r{i}", "id": str(i)}
    for i in range(300)
]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def mixture(*sources, streaming=True, **options) -> MixtureConfig:
    informs = []
    for source in sources:
        named = source if isinstance(source, dict) else {"data_files": source}
        fields: dict[str, Any] = dict(named)
        fields |= {"columns": ColumnsConfig(**fields.get("columns", {}))}
        informs.append(SourceConfig(**fields))
    return MixtureConfig(
        informs=tuple(informs), cache_dir="cache", streaming=streaming, **options
    )


def rows_of(stream: RowStream, number: int = 0) -> list[tuple[str, dict]]:
    """(origin, row) of a pass."""
    return [
        (chunk.where(i), row)
        for chunk in stream.chunks(number)
        for i, row in enumerate(chunk.rows, chunk.first)
    ]


def held_rows(*sources, **options) -> list[tuple[str, dict]]:
    """The same of the mixture that is read whole."""
    rows = load_mixture(mixture(*sources, streaming=False, **options))
    found = [row for _, batch in rows.batches(7) for row in batch]
    return [(rows.where(i), row) for i, row in enumerate(found)]


def write(kind: str) -> str | dict:
    data = Dataset.from_list(ROWS)
    match kind:
        case "jsonl":
            Path("a.jsonl").write_text("\ufeff" + TEXT)
            return "a.jsonl"
        case "gz":
            Path("a.jsonl.gz").write_bytes(gzip.compress(TEXT.encode()))
            return "a.jsonl.gz"
        case "csv" | "tsv":
            data.to_csv(f"a.{kind}", sep="\t" if kind == "tsv" else ",")
            return f"a.{kind}"
        case "csv.bz2":
            data.to_csv("a.csv")
            Path("a.csv.bz2").write_bytes(bz2.compress(Path("a.csv").read_bytes()))
            return "a.csv.bz2"
        case "parquet":
            data.to_parquet("a.parquet")
            return "a.parquet"
        case "arrow":
            data.save_to_disk("saved")
            (path,) = Path("saved").glob("*.arrow")
            return str(path)
        case "saved":
            data.save_to_disk("saved")
            return "saved"
        case "folder":
            Path("folder").mkdir()
            Path("folder/train.jsonl").write_text(TEXT)
            Path("folder/test.jsonl").write_text(TEXT[: TEXT.index("\n") + 1])
            return {"data_files": "folder", "split": "test"}
    raise AssertionError(kind)


KINDS = "jsonl gz csv tsv csv.bz2 parquet arrow saved folder".split()


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_has_the_rows_of_the_data_set(kind):
    source = write(kind)
    stream = stream_mixture(mixture(source))
    expected = held_rows(source)
    assert len(expected) == (1 if kind == "folder" else 300)
    assert rows_of(stream) == expected == rows_of(stream, 1)


def test_columns_and_num_rows_of_a_source():
    columns = {"prompt": "id", "chosen": "rejected", "rejected": "chosen"}
    for kind in ("jsonl", "parquet"):
        source: Any = {"data_files": write(kind), "num_rows": 200}
        source |= {"columns": columns}
        found = rows_of(stream_mixture(mixture(source)))
        assert found == held_rows(source) and len(found) == 200
        assert found[7][1]["prompt"] == "7"


def test_sources_come_one_after_another():
    sources: Any = write("jsonl"), {"data_files": write("parquet"), "num_rows": 3}
    found = rows_of(stream_mixture(mixture(*sources)))
    assert found == held_rows(*sources)
    assert found[301][0] == "a.parquet, row 1 (counting from 0)"


def test_weights_draw_sources_until_the_drawn_one_has_no_more():
    Path("b.jsonl").write_text(TEXT)
    write("jsonl")
    options: dict[str, Any] = {"mixture_weights": (3, 1), "seed": 5}
    stream = stream_mixture(mixture("a.jsonl", "b.jsonl", **options))
    found = [where for where, _ in rows_of(stream)]
    assert found == [where for where, _ in rows_of(stream, 1)]
    of_a = [where for where in found if where.startswith("a.")]
    # The first source is used up, in its order, and the other up to its share.
    assert of_a == [f"a.jsonl, row {i} (counting from 0)" for i in range(300)]
    expected, deviation = 100, (300 * 1 / 3 * 4 / 3) ** 0.5  # negative binomial
    assert abs(len(found) - 300 - expected) < 4 * deviation
    other_options: dict[str, Any] = options | {"seed": 6}
    other = stream_mixture(mixture("a.jsonl", "b.jsonl", **other_options))
    assert found != [where for where, _ in rows_of(other)]
    first = stream.first(50)
    assert [first.where(i) for i in range(50)] == found[:50]


def test_nothing_is_read_before_it_is_needed():
    """The line that is no JSON is met where it stands, and not before."""
    Path("a.jsonl").write_text(TEXT + "{oops\n" + TEXT)
    stream = stream_mixture(mixture("a.jsonl"))
    chunks = stream.chunks(0)
    assert len(list(itertools.islice(chunks, 300 // CHUNK))) == 300 // CHUNK
    with pytest.raises(InputError, match="^a.jsonl, line 301, is not JSON"):
        next(chunks)


@pytest.mark.parametrize(
    "source, message",
    [
        ("list.json", "list.json is one list, of which nothing is read before its end"),
        (
            {"data_files": "a.jsonl", "split": "train[:90%]"},
            r"split='train\[:90%\]' of a.jsonl \(train\[:90%\]\) cannot be streamed: ",
        ),
        ({"data_files": "saved", "split": "train+test"}, "cannot be streamed: "),
        ({"data_files": "a.jsonl", "split": "test"}, "no split 'test', only train"),
        ({"data_files": "saved", "split": "test"}, "no split 'test', only train"),
        ("blank.jsonl", "blank.jsonl is empty; give at least one preference pair"),
        ("header.csv", "header.csv has no rows; give at least one pair"),
        (
            "wide.csv",
            r"wide.csv, line 3: 4 cells \('p', 'c', 'r', ...\) under a header",
        ),
        ("bytes.jsonl", "bytes.jsonl, line 2, byte 3, is not UTF-8 text"),
        ("cut.jsonl.gz", "cut.jsonl.gz cannot be read: it is no sound .gz archive"),
        ("other.parquet", "other.parquet has no column 'chosen'; it has text"),
        ("other.jsonl", "has no 'chosen', but 'choosen', which is not read"),
        ("nowhere.jsonl", "nowhere.jsonl does not exist"),
        (
            {"data_files": "a.parquet", "columns": {"weight": "wight"}},
            "a.parquet has no column 'wight', which columns.weight names",
        ),
        (
            {"data_files": "long.jsonl", "columns": {"weight": "wight"}},
            "long.jsonl, in its first 1000 rows, has no column 'wight'",
        ),
        (
            {"data_files": "a.jsonl", "columns": {"system": "id"}},
            "columns.system='id' has no effect without a column conversations",
        ),
    ],
)
def test_what_cannot_be_streamed_is_one_line(source, message):
    for kind in ("jsonl", "parquet", "saved"):
        write(kind)
    Path("list.json").write_text(json.dumps(ROWS))
    Path("blank.jsonl").write_text("\n \n")
    Path("header.csv").write_text("prompt,chosen,rejected\n")
    Path("wide.csv").write_text("prompt,chosen,rejected\np,c,r\np,c,r,x\n")
    Path("bytes.jsonl").write_bytes(b"\n{ \xff}\n")
    Path("cut.jsonl.gz").write_bytes(gzip.compress(TEXT.encode())[:-9])
    Dataset.from_list([{"text": "t"}]).to_parquet("other.parquet")
    Path("other.jsonl").write_text('{"prompt": "p", "choosen": "c", "rejected": "r"}')
    Path("long.jsonl").write_text(4 * TEXT)
    with pytest.raises(InputError, match=message):
        rows_of(stream_mixture(mixture(source)))


def test_a_mixture_that_streams_is_not_read_whole():
    with pytest.raises(InputError, match="^streaming=True has no effect"):
        load_mixture(mixture(write("jsonl")))


def test_a_data_set_of_python_is_streamed():
    data = Dataset.from_list(ROWS).to_iterable_dataset()
    assert [row["prompt"] for _, row in rows_of(stream_rows(data))] == [
        row["prompt"] for row in ROWS
    ]
    # Its own shuffling goes on from pass to pass.
    stream = stream_rows(data.shuffle(seed=1, buffer_size=300), 1)
    orders = [[row["prompt"] for _, row in rows_of(stream, n)] for n in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert stream.buffer == 1 and stream_rows(data).buffer == 1000


def test_a_data_set_that_fails_or_can_be_read_once():
    def fails():
        yield ROWS[0]
        raise OSError("the line is dead")

    stream = stream_rows(IterableDataset.from_generator(fails))
    with pytest.raises(InputError, match="from row 0 .* on: the line is dead"):
        rows_of(stream)
    once = iter(ROWS[:3])
    stream = stream_rows(IterableDataset.from_generator(lambda: once))
    assert len(rows_of(stream)) == 3
    with pytest.raises(InputError, match="the data set has no rows when it is read ag"):
        rows_of(stream, 1)


def test_what_is_no_stream_says_what_to_give():
    data = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(InputError, match="pick one of its splits"):
        stream_rows(IterableDatasetDict({"train": data}))
    with pytest.raises(InputError, match="a Dataset is not streamed; give a datasets."):
        stream_rows(Dataset.from_list(ROWS))
    with pytest.raises(InputError, match="; only train_dataset may be one that is st"):
        as_rows(data)
