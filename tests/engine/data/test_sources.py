import gzip
import json
import os
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from engine.config.run import MixtureConfig, SourceConfig
from engine.data.pairs import load_mixture
from engine.errors import InputError

ROWS = [{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(10)]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def lines(path, rows=ROWS) -> str:
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def load(*sources, weights=None, seed=0):
    informs = tuple(
        SourceConfig(**(s if isinstance(s, dict) else {"data_files": s}))
        for s in sources
    )
    return load_mixture(
        MixtureConfig(
            informs=informs, mixture_weights=weights, cache_dir="cache", seed=seed
        )
    )


def prompts(rows) -> list[str]:
    return [row["prompt"] for _, batch in rows.batches(3) for row in batch]


def all_prompts(start=0, stop=10) -> list[str]:
    return [f"p{i}" for i in range(start, stop)]


# ---------------------------------------------------------------- what can be read


def write_json(path):
    path = f"{path}.json"
    with open(path, "w") as file:
        json.dump(ROWS, file)
    return path


def write_gz(path):
    path = f"{path}.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    return path


def write_csv(path):
    Dataset.from_list(ROWS).to_csv(f"{path}.csv")
    return f"{path}.csv"


def write_parquet(path):
    Dataset.from_list(ROWS).to_parquet(f"{path}.parquet")
    return f"{path}.parquet"


def write_arrow(path):
    Dataset.from_list(ROWS).save_to_disk(path)
    os.rename(f"{path}/data-00000-of-00001.arrow", f"{path}.arrow")
    return f"{path}.arrow"


def write_folder(path):
    os.mkdir(path)
    lines(f"{path}/train.jsonl")
    return path


def write_saved(path):
    Dataset.from_list(ROWS).save_to_disk(path)
    return path


def write_saved_splits(path):
    data = Dataset.from_list(ROWS)
    DatasetDict({"train": data, "test": data.select([4])}).save_to_disk(path)
    return path


@pytest.mark.parametrize(
    "write",
    [
        lambda path: lines(f"{path}.jsonl"),
        write_json,
        write_gz,
        write_csv,
        write_parquet,
        write_arrow,
        write_folder,
        write_saved,
        write_saved_splits,
    ],
)
@pytest.mark.parametrize(
    "split, expected",
    [
        ("train", all_prompts()),
        ("train[:90%]", all_prompts(0, 9)),
        ("train[:2]+train[-1:]", ["p0", "p1", "p9"]),
    ],
)
def test_every_kind_of_source_and_slices(write, split, expected):
    path = write("pairs")
    rows = load({"data_files": path, "split": split})
    assert prompts(rows) == expected
    assert rows.where(1).startswith(path) and "row 1 (counting" in rows.where(1)


def test_other_splits_and_num_rows():
    path = write_saved_splits("pairs")
    assert prompts(load({"data_files": path, "split": "test"})) == ["p4"]
    assert prompts(load({"data_files": path, "num_rows": 2})) == ["p0", "p1"]
    assert len(load({"data_files": path, "num_rows": 200})) == 10


def test_several_files_and_patterns():
    lines("a1.jsonl", ROWS[:4])
    lines("a2.jsonl", ROWS[4:])
    lines("named", ROWS[:2])
    assert prompts(load({"data_files": ("a1.jsonl", "a2.jsonl")})) == all_prompts()
    assert prompts(load("a*.jsonl")) == all_prompts()
    assert prompts(load({"data_files": "named", "type": "jsonl"})) == all_prompts(0, 2)


def test_cells_of_csv_are_text():
    with open("a.csv", "w") as file:
        file.write("id,prompt,chosen,rejected\n7,NA,007,null\n8,1.50,,x\n")
    (_, rows), *_ = load("a.csv").batches(9)
    assert rows == [
        {"prompt": "NA", "chosen": "007", "rejected": "null"},
        {"prompt": "1.50", "chosen": "", "rejected": "x"},
    ]


def test_columns_that_are_not_needed_are_left_out():
    lines("a.jsonl", [{**ROWS[0], "score": 1, "tools": None}])
    (_, rows), *_ = load("a.jsonl").batches(9)
    assert rows == [{**ROWS[0], "tools": None}]


# ---------------------------------------------------------------- mixtures


def test_sources_follow_each_other_whatever_their_columns():
    lines("a.jsonl", ROWS[:3])
    turn = [{"role": "user", "content": "x"}]
    lines("b.jsonl", [{"chosen": turn, "rejected": turn}] * 2)
    rows = load("a.jsonl", "b.jsonl")
    assert [row.get("prompt") for _, b in rows.batches(4) for row in b] == [
        *all_prompts(0, 3),
        None,
        None,
    ]
    assert rows.where(4) == "b.jsonl, row 1 (counting from 0)"


def test_weights_interleave_in_exact_proportions_without_repeats():
    lines("a.jsonl", [{**ROWS[0], "prompt": f"a{i}"} for i in range(60)])
    lines("b.jsonl", [{**ROWS[0], "prompt": f"b{i}"} for i in range(20)])
    first = prompts(load("a.jsonl", "b.jsonl", weights=(1, 1)))
    a, b = ([p for p in first if p[0] == c] for c in "ab")
    assert a == [f"a{i}" for i in range(20)] and b == [f"b{i}" for i in range(20)]
    assert first != a + b
    assert first == prompts(load("a.jsonl", "b.jsonl", weights=(1, 1)))
    assert first != prompts(load("a.jsonl", "b.jsonl", weights=(1, 1), seed=1))
    assert len(load("a.jsonl", "b.jsonl", weights=(0.75, 0.25))) == 80
    uneven = prompts(load("a.jsonl", "b.jsonl", weights=(9.0, 1.0)))
    assert sum(p[0] == "a" for p in uneven) == 60 and len(uneven) == 66


# ---------------------------------------------------------------- what cannot


def bad_files():
    lines("ok.jsonl")
    lines("numbers.jsonl", [{"prompt": "p", "chosen": "c"}])
    Path("loop.jsonl").symlink_to("loop.jsonl")
    lines("near.jsonl", [{"prompt": "p", "choosen": "c", "rejected": "r"}])
    with open("cut.jsonl", "w") as file:
        file.write(json.dumps(ROWS[0]) + '\n{"prompt": "p\n')
    with open("bytes.jsonl", "wb") as file:
        file.write(b"\n" + 117 * b"x" + b"\x80")
    with open("cut.parquet", "wb") as file:
        Dataset.from_list(ROWS).to_parquet("whole.parquet")
        with open("whole.parquet", "rb") as whole:
            file.write(whole.read()[:-20])
    with open("cut.arrow", "wb") as file:
        file.write(b"ARROW")
    for name in ("empty.jsonl", "empty.csv", "notes.txt"):
        open(name, "w").close()
    with open("list.json", "w") as file:
        file.write("[]")
    with open("rows.csv", "w") as file:
        file.write("prompt,chosen,rejected\n")
    with open("ragged.csv", "w") as file:
        file.write("prompt,chosen,rejected\na,b,c\na,b,c,d\n")
    os.mkdir("folder")
    write_saved("saved")


@pytest.mark.parametrize(
    "source, message",
    [
        ("none.jsonl", "none.jsonl does not exist"),
        ("none*.jsonl", "none*.jsonl does not exist"),
        ("empty.jsonl", "empty.jsonl is empty; give at least one"),
        ("empty.csv", "empty.csv is empty"),
        ("list.json", "list.json has no rows; give at least one"),
        ("rows.csv", "rows.csv has no rows; give at least one"),
        (
            "numbers.jsonl",
            "numbers.jsonl has no column 'rejected'; it has prompt, chos",
        ),
        (
            "near.jsonl",
            "near.jsonl, line 1, has no 'chosen', but 'choosen', which is not read; "
            "rename it to 'chosen'",
        ),
        (
            {"data_files": "ok.jsonl", "dataset_split_name": "a"},
            "dataset_split_name='a' has no effect with ok.jsonl",
        ),
        ("loop.jsonl", "loop.jsonl cannot be read: "),
        ({"data_files": "fold*", "type": "json"}, "fold* matches folders only"),
        (
            "cut.jsonl",
            "cut.jsonl, line 2, is not JSON (Unterminated string starting at, "
            "column 12); "
            "write one object a line, or one list of objects",
        ),
        (
            "bytes.jsonl",
            "bytes.jsonl, line 2, byte 118, is not UTF-8 text (0x80); save the file as "
            "UTF-8",
        ),
        (
            "ragged.csv",
            "ragged.csv, line 3: 4 cells ('a', 'b', 'c', ...) under a header of 3 "
            "(prompt, chosen, rejected); put a cell that holds a comma in double",
        ),
        ("cut.parquet", "cut.parquet cannot be read as parquet: "),
        ("cut.arrow", "cut.arrow cannot be read as arrow: "),
        ("notes.txt", "notes.txt is a file whose name does not tell its type"),
        ("./nothing", "./nothing is not a folder with data in it"),
        ("folder", "folder cannot be read as hf: "),
        ({"data_files": "folder", "type": "json"}, "folder is a folder; read it with"),
        ({"data_files": ("saved", "folder")}, "type hf takes one hub id or folder"),
        ({"data_files": ("ok.jsonl", "rows.csv")}, "are of several types (csv, json)"),
        ({"data_files": "ok.jsonl", "split": "test"}, 'Unknown split "test". Should'),
        ({"data_files": "saved", "split": "test"}, 'Unknown split "test". Should'),
        ({"data_files": "saved", "split": "train[:x]"}, "Unrecognized instruction"),
        ({"data_files": "saved", "split": "train[5:2]"}, "train[5:2]) has no rows"),
        ({"data_files": "ok.jsonl", "split": "train[5:5]"}, "has no rows"),
    ],
)
def test_a_bad_source_is_named_in_one_line(source, message):
    bad_files()
    with pytest.raises(InputError) as caught:
        load(source)
    said = str(caught.value)
    assert message in said and "\n" not in said
