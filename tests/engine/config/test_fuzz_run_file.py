"""Run files and overrides of any kind end in a configuration, or in one clear line."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engine.config.provenance import resolved
from engine.config.run import RunConfig, load_run_config
from engine.config.run_file import dotted_keys
from tests.engine.fuzzing import JSON, TEXT, examples, mutated, one_line_or_success

VALID: dict[str, Any] = {
    "config": {
        "model": {"name_or_path": "m", "tokenizer": "t", "dtype": "float32"},
        "reference_model": {"name_or_path": "r"},
        "lora": {"r": 4, "target_modules": ["q_proj"]},
        "mixture": {
            "informs": [
                {"type": "json", "data_files": "a.jsonl", "columns": {"prompt": "q"}},
                {"data_files": ["b.csv", "c.csv"], "split": "train[:9]"},
            ],
            "mixture_weights": [0.5, 2],
        },
        "eval_mixture": {"informs": [{"data_files": "e.jsonl", "num_rows": 3}]},
        "sharding": {"data": 1, "fsdp": -1},
        "trainer": {
            "beta": 0.1,
            "loss_type": ["sigmoid", "sft"],
            "loss_weights": [1, 0.5],
            "learning_rate": 1e-6,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": 0},
            "warmup_ratio": 0.1,
            "eval_steps": 5,
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
    },
    "actions": ["validate", "train"],
}
KEYS = st.sampled_from(list(dotted_keys(RunConfig)))
WORDS = st.lists(
    st.one_of(
        st.builds("{}={}".format, KEYS, st.one_of(TEXT, JSON.map(repr))),
        st.builds("{}.{}={}".format, KEYS, TEXT, TEXT),
        TEXT,
    ),
    max_size=3,
)
# What YAML is made of, so that more than its first character is read.
PIECES = st.lists(
    st.one_of(
        st.sampled_from(
            "config: |model: |trainer: |beta: |name_or_path: |mixture: |informs: |- |"
            "[|]|{|}|, |: |\n|\n  |\n    |\t|&a |*a|<<: |!!python/name:os.system |"
            "!!int |!!binary |!!timestamp |!!set |!!float |--- |...\n|%YAML 1.1\n|? |"
            "'|\"|>-\n|# |1e-6|010|1:30|0x1f|.nan|~|yes|2024-01-31|=|\ufeff|\0".split(
                "|"
            )
        ),
        TEXT,
    ),
    max_size=20,
).map("".join)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "run.yaml"


def load(path: Path, text: str | bytes, words: list[str]) -> RunConfig | str:
    path.write_bytes(
        text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    )
    found = one_line_or_success(load_run_config, path, words)
    if isinstance(found, str):
        assert found.startswith((f"{path}: ", "command line: ")), found
    else:  # what `dpo show` prints is a run file of the same run
        shown = path.with_name("shown.yaml")
        shown.write_text(resolved(path, words), encoding="utf-8")
        assert load_run_config(shown) == found
    return found


def test_what_is_mutated_is_valid(path):
    assert isinstance(load(path, yaml.safe_dump(VALID), []), RunConfig)


@given(mutated(VALID))
@examples(30)
def test_fuzz_values_of_a_run_file(path, tree):
    found = load(path, yaml.safe_dump(tree, allow_unicode=True), [])
    assert isinstance(found, RunConfig | str)


@given(KEYS.filter(lambda key: "." in key), JSON)
@examples(30)
def test_fuzz_the_key_that_is_wrong_is_named(path, key, value):
    tree = yaml.safe_load(yaml.safe_dump(VALID))
    *above, last = ["config", *key.split(".")]
    place: Any = tree
    for part in above:
        if isinstance(place, list):
            place = place[int(part)]
        else:
            place = place.setdefault(part, {})
    place[last] = value
    found = load(path, yaml.safe_dump(tree), [])
    if isinstance(found, str):  # of a key that others need, that may be said of them
        assert last in found or " is missing" in found


@given(st.one_of(PIECES, st.binary(max_size=40)))
@examples(100)
def test_fuzz_text_of_a_run_file(path, text):
    load(path, text, [])


@given(WORDS)
@examples(30)
def test_fuzz_overrides(path, words):
    load(path, yaml.safe_dump(VALID), words)
