"""Data that is refused, and what is said of it."""

import json
import pickle
from pathlib import Path
from typing import Any

from datasets import Dataset

from tests.engine.refusals import ROWS, Case, both, remove, row, rows, write


def source(**values: Any) -> Any:
    return {"mixture": {"informs": [values]}}


def parquet_cut_off():
    Dataset.from_list(json_rows()).to_parquet("pairs.parquet")
    data = Path("pairs.parquet").read_bytes()
    Path("pairs.parquet").write_bytes(data[: len(data) // 2])


def json_rows():
    return [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]


def pickled_rows():
    Path("pairs.pkl").write_bytes(pickle.dumps(json_rows()))


def all_alike():
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    Path("pairs.jsonl").write_text(2 * (json.dumps(same) + "\n"))


ROW = "pairs.jsonl, row 3 (counting from 0)"
USER = [{"role": "user", "content": "hi"}]
ASSISTANT = [{"role": "assistant", "content": "yes"}]
DATA = {
    "a misspelt column": Case(
        "pairs.jsonl, line 4, has no 'chosen', but 'choosen', which is not read",
        row(chosen=None, choosen="x"),
    ),
    "a row without a column": Case(f"{ROW}, has no 'rejected'", row(rejected=None)),
    "a number for text": Case(f"{ROW}, field 'chosen', is 5 (a int)", row(chosen=5)),
    "null for text": Case(
        f"{ROW}, field 'chosen', is null; it must be text",
        lambda: rows({"prompt": "a", "chosen": None, "rejected": "b"}),
    ),
    "ids for text": Case(
        f"{ROW}, field 'chosen', is a list of num", row(chosen=[1, 2])
    ),
    "no messages": Case(f"{ROW}, field 'chosen', is an empty list", row(chosen=[])),
    "a message without a role": Case(
        f"{ROW}, field 'chosen', message 0, has no 'role'",
        row(chosen=[{"content": ""}]),
    ),
    "text beside messages": Case(
        f"{ROW}, field 'rejected', is text, but chosen is a list of messages",
        row(prompt=USER, chosen=ASSISTANT),
    ),
    "messages without a template": Case(
        f"{ROW}, holds lists of messages, but the tokenizer has no chat template; name",
        both(
            remove("model/chat_template.jinja"),
            row(prompt=USER, chosen=ASSISTANT, rejected=ASSISTANT),
        ),
    ),
    "turns that do not alternate": Case(
        f"{ROW}, field 'conversations', message 1, is of the role 'user'; after",
        row(prompt=None, conversations=2 * [{"from": "human", "value": "a"}]),
    ),
    "a weight below 0": Case(f"{ROW}, field 'weight', is -1", row(weight=-1)),
    "half of the reference's values": Case(
        "pairs.jsonl, row 0 (counting from 0), has no ref_chosen_logps, and another",
        row(ref_chosen_logps=-1.5),
    ),
    "ids that no token has": Case(
        "pairs.jsonl, row 0 (counting from 0), has the token id 99999 in its chosen",
        write(
            "pairs.jsonl",
            '{"prompt_ids": [1], "chosen_ids": [99999], "rejected_ids": [2]}\n',
        ),
    ),
    "a mask that is no list": Case(
        "pairs.jsonl, row 0 (counting from 0), field 'prompt_input_ids', has 1 ids, ",
        write(
            "pairs.jsonl",
            '{"prompt_input_ids": [1], "chosen_input_ids": [1], "rejected_input_ids": '
            '[2], "prompt_attention_mask": 7}\n',
        ),
    ),
    "ids that are no list": Case(
        "pairs.jsonl, row 0 (counting from 0), field 'rejected_ids', is False (a bool)",
        write(
            "pairs.jsonl",
            '{"prompt_ids": [1], "chosen_ids": [1], "rejected_ids": false}\n',
        ),
    ),
    "answers that are all alike": Case(
        "train_dataset: all of its 2 pairs have the same tokens in chosen and rejected"
        "...nothing can be learned; give two different answers",
        all_alike,
    ),
    "broken JSON": Case(
        "pairs.jsonl, line 4, is not JSON (",
        write("pairs.jsonl", "\n\n" + json.dumps(ROWS[0]) + '\n{"prompt": "a\n'),
    ),
    "a broken list": Case(
        "pairs.jsonl, line 2, is not JSON (", write("pairs.jsonl", "[\n{]\n")
    ),
    "nested too deeply": Case(
        "pairs.jsonl, line 1, is JSON nested too deeply",
        write("pairs.jsonl", '{"prompt": ' + "[" * 100_000),
    ),
    "a key twice": Case(
        "pairs.jsonl, line 1: an object has the key 'chosen' twice",
        write("pairs.jsonl", '{"chosen": "a", "chosen": "b", "rejected": "c"}'),
    ),
    "UTF-16": Case(
        "pairs.jsonl, line 1, byte 1, is not UTF-8 text (0xff, it looks like UTF-16)",
        write("pairs.jsonl", '{"a": 1}'.encode("utf-16")),
    ),
    "a quote that is not closed": Case(
        "pairs.csv, line 2: a quoted cell that begins in this row is never closed",
        write("pairs.csv", 'prompt,chosen,rejected\n"a,b,c\n'),
        **source(data_files="pairs.csv"),
    ),
    "a damaged archive": Case(
        "pairs.jsonl.gz cannot be read: it is no sound .gz archive",
        write("pairs.jsonl.gz", "none"),
        **source(data_files="pairs.jsonl.gz"),
    ),
    "Parquet cut off": Case(
        "pairs.parquet cannot be read as parquet: ",
        parquet_cut_off,
        **source(data_files="pairs.parquet"),
    ),
    "pickled rows": Case(
        "pairs.pkl is a file whose name does not tell its type; set type to",
        pickled_rows,
        **source(data_files="pairs.pkl"),
    ),
    "a data set with code": Case(
        "data has a loading script, data.py, and none is ever run",
        both(write("data/data.py", "open('ran', 'w')"), write("data/a.jsonl", "{}\n")),
        **source(data_files="data"),
    ),
    "a hub that cannot be reached": Case(
        "nobody/pairs cannot be read as a hub id, and is no folder here: ",
        **source(data_files="nobody/pairs"),
    ),
    "no such split": Case(
        'pairs.jsonl (test) cannot be read as json: Unknown split "test"',
        **source(data_files="pairs.jsonl", split="test"),
    ),
    "data for evaluation": Case(
        "held.jsonl does not exist (from ",
        eval_mixture={"informs": [{"data_files": "held.jsonl"}]},
    ),
}
