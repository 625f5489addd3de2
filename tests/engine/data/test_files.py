"""Names of files, Parquet's columns, and what of a folder is read."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from engine.config.run import MixtureConfig, SourceConfig
from engine.data.pairs import load_mixture
from engine.errors import InputError

ROWS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(10)]
PROMPTS = [row["prompt"] for row in ROWS]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def write(path, rows=ROWS, opener=open):
    with opener(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def load(data_files, **options):
    source = SourceConfig(data_files=data_files, **options)
    return load_mixture(MixtureConfig(informs=(source,), cache_dir="cache"))


def prompts(rows) -> list[str]:
    return [row["prompt"] for _, batch in rows.batches(3) for row in batch]


# ---------------------------------------------------------------- names of files


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "pairs.jsonl")
    assert prompts(load("~/pairs.jsonl")) == PROMPTS
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert prompts(load("~/saved")) == PROMPTS


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_name_that_looks_like_a_pattern_is_a_name_if_there_is_such_a_file(ending):
    data = Dataset.from_list(ROWS)
    to = {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}
    to[ending](f"run[7].{ending}")
    assert prompts(load(f"run[7].{ending}")) == PROMPTS
    with pytest.raises(InputError, match=r"run\[8\].* does not exist"):
        load(f"run[8].{ending}")
    to[ending](f"run8.{ending}")
    assert prompts(load(f"run[8].{ending}")) == PROMPTS


# ---------------------------------------------------------------- Parquet


def test_parquet_without_rows():
    Dataset.from_list(ROWS).select([]).to_parquet("empty.parquet")
    Dataset.from_list(ROWS).to_parquet("full.parquet")
    with pytest.raises(InputError) as caught:
        load("empty.parquet")
    assert str(caught.value) == "empty.parquet has no rows; give at least one pair"
    both = load(("empty.parquet", "full.parquet"))
    assert prompts(both) == PROMPTS


def test_parquet_files_of_different_columns_are_named():
    Dataset.from_list(ROWS).to_parquet("text.parquet")
    turn = [{"role": "user", "content": "x"}]
    other = [{"prompt": "p", "chosen": turn, "rejected": turn}]
    Dataset.from_list(other).to_parquet("turns.parquet")
    with pytest.raises(InputError) as caught:
        load(("text.parquet", "turns.parquet"))
    said = str(caught.value)
    assert said.startswith("turns.parquet: the column 'chosen' is list<")
    assert said.endswith(
        "but string in text.parquet; give each an entry of its own in informs"
    )


# ---------------------------------------------------------------- folders


def test_files_of_a_folder_that_are_not_read_are_counted(caplog):
    os.makedirs("mixed/more")
    write("mixed/a.jsonl", ROWS[:6])
    write("mixed/b.jsonl", ROWS[6:])
    Dataset.from_list(ROWS).to_csv("mixed/c.csv")
    write("mixed/more/d.jsonl.gz", opener=gzip.open)
    open("mixed/README.txt", "w").close()
    assert len(load("mixed")) == 20  # d.jsonl.gz is one of the JSON files
    (said,) = [record.getMessage() for record in caplog.records]
    assert "mixed: 1 of its 4 data files are not read, the first c.csv: only" in said
    caplog.clear()
    os.remove("mixed/c.csv")
    load("mixed")
    assert not caplog.records


def test_text_in_a_folder_is_read_to_the_letter():
    os.mkdir("folder")
    write("folder/train.jsonl", [{**ROWS[0], "chosen": "2024-02-01 10:00:00"}])
    write("folder/test.jsonl", [{**ROWS[1], "chosen": "2024-02-02"}])
    (_, rows), *_ = load("folder", split="train+test").batches(9)
    assert [row["chosen"] for row in rows] == ["2024-02-01 10:00:00", "2024-02-02"]
    os.mkdir("tabs")
    with open("tabs/a.tsv", "w") as file:
        file.write("chosen\trejected\na,b\tc\n")
    (_, rows), *_ = load("tabs").batches(9)
    assert rows == [{"chosen": "a,b", "rejected": "c"}]


@pytest.mark.parametrize("script", ["folder.py", "other.py"])
def test_no_script_of_a_data_set_is_run(script):
    os.mkdir("folder")
    write("folder/pairs.jsonl")
    with open(f"folder/{script}", "w") as file:
        file.write("open('../ran', 'w').close()\n")
    if script == "folder.py":  # which older versions of `datasets` took for a loader
        with pytest.raises(InputError, match="loading script, folder.py, and none is"):
            load("folder")
    else:
        assert prompts(load("folder")) == PROMPTS
    assert not os.path.exists("ran")


def test_a_folder_that_is_called_like_a_reader():
    os.mkdir("json")
    Dataset.from_list(ROWS).to_csv("json/pairs.csv")
    assert prompts(load("json")) == PROMPTS
    with pytest.raises(InputError, match="^csv is no folder here, and no hub id; name"):
        write("pairs.csv")
        load("csv")


def test_a_data_card_that_is_no_yaml():
    os.mkdir("folder")
    write("folder/pairs.jsonl")
    with open("folder/README.md", "w") as file:
        file.write("---\nconfigs: [\n---\n")
    with pytest.raises(InputError) as caught:
        load("folder")
    assert str(caught.value).startswith(
        "folder cannot be read as hf: its data card, README.md, is no valid YAML "
        "(while "
    )


def test_a_pattern_that_does_not_tell_a_type():
    os.mkdir("folder")
    write("folder/pairs.jsonl")
    with pytest.raises(InputError, match=r"folder/\* is a pattern that does not tell"):
        load("folder/*")
    assert prompts(load("folder/*", type="json")) == PROMPTS


def test_files_of_other_kinds_are_refused():
    os.mkdir("folder")
    with open("folder/pairs.txt", "w") as file:
        file.write("text")
    with pytest.raises(InputError, match="folder holds text files; json, csv, parquet"):
        load("folder")


def test_what_is_put_away_is_not_read(caplog):
    os.mkdir("kept")
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    for name in ("a.jsonl", "a.jsonl.bak"):
        Path("kept", name).write_text(json.dumps({**row, "prompt": name}) + "\n")
    rows = load("kept")
    assert [r["prompt"] for _, batch in rows.batches(9) for r in batch] == ["a.jsonl"]
    assert "kept: 1 of its 2 data files are not read, the first a.jsonl.bak" in (
        caplog.text
    )


@pytest.mark.parametrize(
    "ending, pack", [(".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_tabs_in_a_packed_file(ending, pack):
    Path(f"a.tsv{ending}").write_bytes(pack(b"prompt\tchosen\trejected\np, q\tc\tr\n"))
    ((_, (row,)),) = load(f"a.tsv{ending}").batches(9)
    assert row == {"prompt": "p, q", "chosen": "c", "rejected": "r"}


def test_text_in_parquet_that_is_not_utf8():
    text = pa.array([b"ok", b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    pq.write_table(
        pa.table(dict.fromkeys(["prompt", "chosen", "rejected"], text)), "a.parquet"
    )
    with pytest.raises(
        InputError, match="a.parquet: rows cannot be read: 'utf-8' codec"
    ):
        list(load("a.parquet").batches(9))
