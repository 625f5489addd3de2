import dataclasses
import logging
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Json, Value
from transformers import PreTrainedTokenizerFast

from engine.config.run import MixtureConfig, SourceConfig
from engine.data import cache as token_cache
from engine.data.pair_tokens import Drop, Limits, PairTokens
from engine.data.pairs import load_mixture, tokenize_pairs
from engine.data.rows import PreferenceRows, Source, as_rows
from tests.engine.tiny_tokenizers import make

ROWS = [
    {"prompt": f"p{i}", "chosen": "c" * i, "rejected": f"r{i}", "score": i}
    for i in range(1, 9)
]
ARRAYS = ("tokens", "scored", "offsets", "completion_start", "rows", "weights")
LIMITS = Limits(None, None, 100, "keep_start")


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Grows by the number of texts at each call of the tokenizer."""
    seen: list[int] = []
    encode = PreTrainedTokenizerFast.__call__

    def count(self, texts, **options):
        seen.append(len(texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", count)
    return seen


def assert_same(a: PairTokens, b: PairTokens):
    for name in ("drops", "doubts", "limits"):
        assert getattr(a, name) == getattr(b, name)
    for name in (*ARRAYS, "cut"):
        x, y = getattr(a, name), getattr(b, name)
        np.testing.assert_array_equal(x, y)
        assert np.asarray(x).dtype == np.asarray(y).dtype


def key(rows=ROWS, tokenizer=None, **changes) -> str:
    tokenizer = tokenizer or make()
    return token_cache.cache_key(as_rows(rows), tokenizer, LIMITS._replace(**changes))


def test_the_second_time_nothing_is_tokenised(calls, tmp_path):
    options = {"max_length": 6, "cache_dir": tmp_path}
    first = tokenize_pairs(ROWS, make(), **options)
    assert sum(calls) >= 3 * len(ROWS)
    del calls[:]
    assert_same(tokenize_pairs(ROWS, make(), **options), first)
    assert calls == []
    tokenize_pairs(ROWS, make(), max_length=7, cache_dir=tmp_path)
    assert sum(calls) >= 3 * len(ROWS)
    assert len(list((tmp_path / "tokens").glob("*.arrow"))) == 2
    assert not list((tmp_path / "tokens").glob("*.tmp"))


def test_the_key_is_the_content():
    table = Dataset.from_list(ROWS)
    same = [
        table,
        table.select(range(8)),
        Dataset.from_list(ROWS[:3] + ROWS).select(range(3, 11)),
        table.remove_columns("score"),
        table.with_format("numpy"),
        Dataset(pa.Table.from_pylist(ROWS).replace_schema_metadata({"by": "me"})),
    ]
    assert len({key(rows) for rows in same}) == 1
    changed = [{**ROWS[0], "chosen": "x"}, *ROWS[1:]]
    moved = [{**ROWS[0], "prompt": "p1c", "chosen": ""}, *ROWS[1:]]
    special = make()
    special.add_special_tokens({"eos_token": "~"})
    split = make()
    split.split_special_tokens = True
    keys = [
        key(),
        key(table),
        key(changed),
        key(Dataset.from_list(changed)),
        key(moved),
        key(ROWS[::-1]),
        key(Dataset.from_list(ROWS[::-1])),
        key(table.select([1, 0, 2, 3, 4, 5, 6, 7])),
        key(ROWS[:-1]),
        key(tokenizer=make(merges="ab")),
        key(tokenizer=make(adds_bos=True)),
        key(tokenizer=make(template="{{ messages }}")),
        key(tokenizer=special),
        key(tokenizer=split),
        key(tokenizer=make(bos="</s>", eos="<s>")),
        key(max_length=99),
        key(max_prompt_length=5),
        key(max_completion_length=5),
        key(truncation_mode="keep_end"),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == key() and key(table) == key(Dataset.from_list(ROWS))


def test_the_key_knows_nested_columns():
    def row(content):
        turns = [{"role": "user", "content": "q"}]
        return {
            "chosen": [*turns, {"role": "assistant", "content": content}],
            "rejected": [*turns, {"role": "assistant", "content": "r"}],
        }

    tables = [Dataset.from_list([row(c), row("c")]) for c in ("a", "b", "a")]
    first, second, third = (key(table) for table in tables)
    assert first == third != second


def test_the_key_knows_types():
    text = Dataset.from_dict({"chosen": ['"a"'], "rejected": ['"b"']})
    json = text.cast(Features({"chosen": Json(), "rejected": Value("string")}))
    assert json[0]["chosen"] == "a" and key(text) != key(json)


def test_the_key_knows_the_order():
    data = Source("data", ROWS)
    of, rows = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    orders = [(of, rows), (of[[0, 2, 1, 3]], rows), (of, rows[[1, 0, 2, 3]])]
    keys = {key(PreferenceRows((data, data), *order)) for order in orders}
    assert len(keys) == 3


def test_the_tokenizer_of_a_slow_class_has_a_key(tmp_path):
    slow = make()
    assert token_cache.PreTrainedTokenizerFast is PreTrainedTokenizerFast
    whole = key(tokenizer=slow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "PreTrainedTokenizerFast", int)
        keys = [key(tokenizer=make()), key(tokenizer=make(merges="ab"))]
        assert keys[0] == key(tokenizer=make())
    assert len({whole, *keys}) == 3


def test_a_damaged_file_is_made_again(calls, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "engine.data.cache")
    options = {"max_length": 100, "cache_dir": tmp_path}
    first = tokenize_pairs(ROWS, make(), **options)
    # In memory: the file that its arrays lie in is changed in place below.
    arrays = {name: getattr(first, name).copy() for name in ARRAYS}
    first = dataclasses.replace(first, **arrays)
    (path,) = (tmp_path / "tokens").iterdir()
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[good.index(first.tokens.tobytes()) + 5] ^= 1
    for bad in (good[:-40], b"", b"ab", bytes(flipped), good[: len(good) // 2]):
        path.write_bytes(bad)
        caplog.clear()
        del calls[:]
        assert_same(tokenize_pairs(ROWS, make(), **options), first)
        assert calls and f"{path} is damaged" in caplog.text
        assert path.read_bytes() == good


def test_no_damage_goes_unnoticed(tmp_path):
    path = tmp_path / "pairs.arrow"
    first = tokenize_pairs(ROWS, make(), max_length=100, cache_dir=tmp_path)
    token_cache.store(path, first)
    good = path.read_bytes()
    assert token_cache.load(path) is not None
    rng = np.random.default_rng(0)
    places = [*rng.integers(0, len(good), 150), 0, len(good) - 1]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << rng.integers(8)
        path.write_bytes(bytes(bad))
        assert token_cache.load(path) is None, place


def test_parts_that_do_not_fit_together_are_damage(tmp_path):
    first = tokenize_pairs(ROWS, make(), max_length=100, cache_dir=tmp_path)
    path = tmp_path / "pairs.arrow"
    starts = first.completion_start.copy()
    starts[3] = 0
    late = first.completion_start + first.lengths.astype(np.int32)
    for change in (
        {"completion_start": starts},
        {"completion_start": late},
        {"scored": np.ones_like(first.scored)},
        {"scored": first.scored & (np.arange(len(first.scored)) > first.offsets[1])},
        {"weights": -first.weights},
        {"weights": first.weights * np.float32(np.inf)},
        {"offsets": np.maximum(first.offsets, first.offsets[2])},
    ):
        token_cache.store(path, dataclasses.replace(first, **change))
        assert token_cache.load(path) is None, change.keys()
    token_cache.store(path, first)
    assert token_cache.load(path) is not None


def test_another_table_is_damage(tmp_path):
    path = tmp_path / "pairs.arrow"
    table = pa.table({"tokens": [1]})
    with path.open("wb") as file:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        content = sink.getvalue().to_pybytes()
        file.write(content + struct.pack("<I", zlib.crc32(content)))
    assert token_cache.load(path) is None


def test_tokens_stay_on_disk(tmp_path):
    """What is read is the file's own memory, not a copy of it."""
    for _ in range(2):
        pairs = tokenize_pairs(ROWS, make(), max_length=100, cache_dir=tmp_path)
        (path,) = (tmp_path / "tokens").iterdir()
        maps = Path("/proc/self/maps").read_text().splitlines()
        places = [line.split()[0] for line in maps if line.endswith(path.name)]
        bounds = [[int(x, 16) for x in place.split("-")] for place in places]
        for array in (getattr(pairs, name) for name in ARRAYS):
            assert any(start <= array.ctypes.data < end for start, end in bounds)
            assert not array.flags.writeable


def test_a_file_that_is_replaced_leaves_who_reads_it_alone(tmp_path):
    path = tmp_path / "pairs.arrow"
    first = tokenize_pairs(ROWS, make(), max_length=100, cache_dir=tmp_path)
    token_cache.store(path, first)
    read = token_cache.load(path, first.limits)
    assert read is not None
    token_cache.store(path, dataclasses.replace(first, drops=(Drop("cut away", 7, 0),)))
    path.unlink()
    assert_same(read, first)


def test_a_folder_that_refuses_the_file_is_only_logged(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    pairs = tokenize_pairs(ROWS, make(), max_length=100, cache_dir=tmp_path / "file")
    assert len(pairs) == 8 and "is not kept in" in caplog.text


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "x"))
    tokenize_pairs(ROWS, make(), max_length=100)
    assert os.listdir(tmp_path / "x") == ["tokens"]
    monkeypatch.delenv("DPO_CACHE")
    expected = Path.home() / ".cache" / "dpo_engine"
    assert token_cache.default_cache_dir() == expected


def test_dropped_pairs_are_counted_and_logged_each_time(tmp_path, caplog):
    rows = [*ROWS, {"prompt": "p" * 50, "chosen": "c", "rejected": "r"}]
    for _ in range(2):
        caplog.clear()
        pairs = tokenize_pairs(rows, make(), max_length=20, cache_dir=tmp_path)
        assert pairs.drops == (("cut away", 1, 8),) and len(pairs) == 8
        said = "1 of 9 pairs are dropped (the first: the data set, row 8"
        assert said in caplog.text and "max_length=20 (keep_start)" in caplog.text


def test_from_files_to_pairs_in_the_order_of_the_mixture(tmp_path):
    Dataset.from_list(ROWS[:5]).to_json(tmp_path / "a.jsonl")
    Dataset.from_list(ROWS[5:]).to_parquet(tmp_path / "b.parquet")
    mixture = MixtureConfig(
        informs=tuple(
            SourceConfig(data_files=str(tmp_path / name))
            for name in ("a.jsonl", "b.parquet")
        ),
        cache_dir=str(tmp_path / "datasets"),
    )
    options = {"max_length": 100, "cache_dir": tmp_path}
    pairs = tokenize_pairs(load_mixture(mixture), make(), **options)
    assert_same(pairs, tokenize_pairs(ROWS, make(), **options))
