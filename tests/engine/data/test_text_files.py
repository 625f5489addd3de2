"""CSV and JSON are read to the letter, and what is broken is named by its line."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pytest

from engine.data.json_files import read_json
from engine.data.text_files import PackedRows, read_csv
from engine.errors import InputError

HEADER = "prompt,chosen,rejected\n"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def csv_rows(text: str | bytes, **options) -> list[dict]:
    data = text.encode() if isinstance(text, str) else text
    Path("a.csv").write_bytes(data)
    return [dict(row) for row in read_csv("a.csv", "a.csv", **options)]


def json_rows(text: str | bytes) -> list[dict]:
    data = text.encode() if isinstance(text, str) else text
    Path("a.jsonl").write_bytes(data)
    return [dict(row) for row in read_json("a.jsonl", "a.jsonl")]


def row(prompt: str, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# ---------------------------------------------------------------- CSV


@pytest.mark.parametrize(
    "text, expected",
    [
        (HEADER + "a,b,c\n", [row("a", "b", "c")]),
        (HEADER + "a,b,c", [row("a", "b", "c")]),
        ("\ufeff" + HEADER + "a,b,c\n", [row("a", "b", "c")]),
        (
            HEADER + '"a, and\nmore","say ""b""",\n',
            [row("a, and\nmore", 'say "b"', "")],
        ),
        (HEADER + "NA,null,1.50\n", [row("NA", "null", "1.50")]),
        (HEADER + "2024-01-31, b ,c\n", [row("2024-01-31", " b ", "c")]),
        (HEADER.replace("\n", "\r\n") + 'a,"b\r\nb",c\r\n', [row("a", "b\r\nb", "c")]),
        (HEADER + "\na,b,c\n\n", [row("a", "b", "c")]),
        (HEADER + 'a,the 5" disk,c\n', [row("a", 'the 5" disk', "c")]),
        # An index and a last comma that the header has, too, shift nothing.
        (",prompt,chosen,rejected,\n0,a,b,c,\n", [row("a", "b", "c")]),
        ("id,rejected,chosen\n7,c,b\n", [{"rejected": "c", "chosen": "b"}]),
        (HEADER + "a\u2028b,\u00e9,\u4e2d\n", [row("a\u2028b", "\u00e9", "\u4e2d")]),
        (HEADER, []),
    ],
)
def test_cells_of_csv(text, expected):
    assert csv_rows(text) == expected


def test_cells_of_any_length():
    assert csv_rows(HEADER + f"a,{'b' * 200_000},c\n")[0]["chosen"] == "b" * 200_000


def test_another_delimiter():
    text = HEADER.replace(",", "\t") + "a,a\tb\tc\n"
    assert csv_rows(text, delimiter="\t") == [row("a,a", "b", "c")]


COMMAS = '; put a cell that holds a comma in double quotes: "Well, yes"'


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            HEADER + "Tea?,Green,Black,\nCup?,Big,Small,\n",
            "line 2: 4 cells ('Tea?', 'Green', 'Black', ...) under a header of 3 "
            "(prompt, chosen, rejected); remove the commas at its end",
        ),
        (
            HEADER + "Yes, tea?,Green,Black\nCup?,Big,Small\n",
            "line 2: 4 cells ('Yes', ' tea?', 'Green', ...) under a header of 3 "
            "(prompt, chosen, rejected)" + COMMAS,
        ),
        (
            HEADER + "Cup?,Big,Small\nTea?,Green\n",
            "line 3: 2 cells ('Tea?', 'Green') under a header of 3 (prompt, chosen, "
            "rejected); fill in the missing ones",
        ),
        (
            # The file's line: a cell before it holds two, and a blank one follows.
            HEADER + '"a\nb",c,d\n\nTea?\n',
            "line 5: 1 cell ('Tea?') under a header of 3 (prompt, chosen, rejected); "
            "fill in the missing ones",
        ),
        (
            HEADER + 'a,b,c\nd,"e,f\ng,h,i\n',
            "line 3: a quoted cell that begins in this row is never closed; put a cell "
            "that holds a quote in double quotes, and write each quote in it "
            'twice ("")',
        ),
        (
            HEADER + 'a,"b" c,d\n',
            "line 2: ',' expected after '\"'; put a cell that holds a quote in double "
            'quotes, and write each quote in it twice ("")',
        ),
        (
            "prompt,chosen,rejected,chosen\na,b,c,d\n",
            "line 1: the column 'chosen' is named twice in the header; give each "
            "column "
            "a name of its own",
        ),
    ],
)
def test_csv_that_does_not_fit_its_header_is_named_by_line(text, expected):
    with pytest.raises(InputError) as caught:
        csv_rows(text)
    assert str(caught.value) == f"a.csv, {expected}"


@pytest.mark.parametrize("text", ["\n", "\r\n\n", "\ufeff"])
def test_csv_without_a_header(text):
    with pytest.raises(InputError) as caught:
        csv_rows(text)
    assert str(caught.value) == "a.csv is empty; give at least one preference pair"


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    "text",
    [
        '{"chosen": "2024-01-31", "rejected": "a"}\n',
        '{"chosen": "2024-01-31", "rejected": "a"}',
        '\n  {"rejected": "a", "chosen": "2024-01-31", "score": [1, "x"]}\r\n\n',
        '\ufeff{"chosen": "2024-01-31", "rejected": "a"}\n',
        '[\n  {"chosen": "2024-01-31", "rejected": "a"}\n]\n',
    ],
)
def test_strings_of_json(text):
    assert json_rows(text) == [{"chosen": "2024-01-31", "rejected": "a"}]


def test_a_key_that_nobody_reads_may_be_there_twice():
    assert json_rows('{"id": 1, "chosen": "a", "id": 2}') == [{"chosen": "a"}]


def test_rows_of_json_need_not_be_alike():
    rows = [
        {"chosen": "2024-02-01 10:00:00", "rejected": "\u2028"},
        {"chosen": [{"role": "user", "content": "x"}], "rejected": None},
        {"chosen": 7, "rejected": "\ud83d"},
    ]
    assert json_rows("\n".join(json.dumps(r) for r in rows)) == rows
    assert json_rows(json.dumps(rows[:1], ensure_ascii=False)) == rows[:1]


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            '{"chosen": "a"}\n\n{"chosen" "a"}\n',
            "line 3, is not JSON (Expecting ':' delimiter, column 11); write one "
            "object "
            "a line, or one list of objects",
        ),
        (
            '[{"chosen": "a"},\n {"chosen": }]',
            "line 2, is not JSON (Expecting value, column 13); write one object "
            "a line, "
            "or one list of objects",
        ),
        (
            '{"chosen": "a"}\n["b"]\n',
            'line 2, holds a list; each must be an object with "chosen", '
            '"rejected" and '
            'mostly "prompt"',
        ),
        (
            '["a"]',
            "entry 0 of its list (counting from 0), holds a str; each must be an "
            "object "
            'with "chosen", "rejected" and mostly "prompt"',
        ),
        (
            '{"chosen": "a"}\n{"chosen": "caf\u00e9"}\n'.encode("latin-1"),
            "line 2, byte 16, is not UTF-8 text (0xe9); save the file as UTF-8",
        ),
        (
            b'\xef\xbb\xbf{"chosen": "\xe9"}\n',
            "line 1, byte 16, is not UTF-8 text (0xe9); save the file as UTF-8",
        ),
        (
            '{"chosen": "a"}'.encode("utf-16"),
            "line 1, byte 1, is not UTF-8 text (0xff, it looks like UTF-16); save the "
            "file as UTF-8",
        ),
        (
            # Without the time: it would be in the test's name, other in each worker.
            gzip.compress(b'{"chosen": "a"}', mtime=0),
            "line 1, byte 2, is not UTF-8 text (0x8b, it looks like an archive whose "
            "name should end in .gz); save the file as UTF-8",
        ),
        (
            '{"chosen": "a"}\n{"chosen": "a", "rejected": "b", "chosen": "c"}\n',
            "line 2: an object has the key 'chosen' twice; give each key once",
        ),
        ("[" * 100_000, "line 1, is JSON nested too deeply to be read"),
    ],
)
def test_json_that_is_broken_is_named_by_line(text, expected):
    with pytest.raises(InputError) as caught:
        json_rows(text)
    assert str(caught.value) == f"a.jsonl, {expected}"


# ---------------------------------------------------------------- archives, memory


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
def test_archives(ending):
    name = f"a.jsonl.{ending}"
    data = b'{"chosen": "a"}\n' * 100
    if ending == "zst":
        with pa.output_stream(name, compression="zstd") as stream:
            stream.write(data)
    else:
        with {"gz": gzip, "bz2": bz2, "xz": lzma}[ending].open(name, "wb") as file:
            file.write(data)
    assert list(read_json(name, name)) == [{"chosen": "a"}] * 100
    whole = Path(name).read_bytes()
    for bad in (whole[: len(whole) // 2], b"no archive"):
        Path(name).write_bytes(bad)
        with pytest.raises(InputError, match=f"{name} cannot be read: it is no sound"):
            read_json(name, name)


def test_packed_rows_are_a_sequence():
    rows = PackedRows.of(
        ({"chosen": str(i), "x": i}, ["chosen", "x"]) for i in range(5)
    )
    assert len(rows) == 5 and rows.column_names == ("chosen", "x")
    assert rows[1] == {"chosen": "1"} and list(rows[3:]) == [rows[3], rows[4]]
    other = PackedRows.of([({"rejected": "a"}, ["rejected"])])
    assert rows[:1].joined(other).column_names == ("chosen", "x", "rejected")
    assert list(rows[:1].joined(other)) == [{"chosen": "0"}, {"rejected": "a"}]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "question,chosen,rejected\na,b,c\n",
            "line 1, has no 'prompt', but 'question'",
        ),
        ("\ufeff\ufeff" + HEADER, "line 1, has no 'prompt', but '\\ufeffprompt'"),
        (
            HEADER.replace(",", "\t"),
            "line 1: cells are separated by tabs, but are read",
        ),
        (HEADER.replace(",", ";"), "line 1: cells are separated by semicolons, but"),
        (HEADER + 'a,b,c\n"a", "b","c"\n', "line 3: a cell has a space before its"),
        (HEADER + "a,b\0,c\n", "line 2, has a NUL character (0x00); save"),
        (HEADER.encode("utf-16-le"), "NUL character (0x00, it looks like UTF-16)"),
        (b"PAR1\x15\x04", "it is a Parquet file; set type to parquet"),
        (b"PK\x03\x04\x14\0", "it is a zip archive, or an Excel workbook"),
    ],
)
def test_what_a_csv_file_is_instead(text, message):
    with pytest.raises(InputError) as caught:
        csv_rows(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_quotes_in_cells_with_spaces():
    text = HEADER + '"  ""hi""","so, ""no"", ","x, "\n'
    assert csv_rows(text) == [row('  "hi"', 'so, "no", ', "x, ")]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            '{"promt": "p", "chosen": "c", "rejected": "r"}',
            "has no 'prompt', but 'promt'",
        ),
        ("[" + "9" * 5000 + "]", "line 1, cannot be read: Exceeds the limit"),
    ],
)
def test_json_that_is_not_meant(text, message):
    with pytest.raises(InputError) as caught:
        json_rows('{"prompt": "p", "chosen": "c", "rejected": "r"}\n' + text)
    expected = message.replace("line 1", "line 2")
    assert f"line 2, {expected.removeprefix('line 2, ')}" in str(caught.value)
