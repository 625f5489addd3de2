"""What runs have left, spoilt in any way, ends in a page or in one clear line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.commands import report
from tests.engine.fuzzing import JSON, NUMBERS, examples, mutated, one_line_or_success

LINES: list[dict[str, Any]] = [
    {"step": step, "loss": 0.7 / step, "rewards/margins": 0.1, "perf/step_seconds": 1.0}
    for step in (1, 2, 3)
] + [{"step": 3, "eval_loss": 0.5, "eval_rewards/margins": None}]
RECORD = {
    "config": {"model": {"name_or_path": "m"}, "trainer": {"beta": 0.1}}
    | {"mixture": {"informs": [{"data_files": "a"}]}},
    "facts": {"model": "m: llama", "steps": "3"},
}
TEXTS = [{"step": s, "prompt": "a", "text": f"b{s}", "reference": "c"} for s in (0, 3)]
VALUES = JSON | NUMBERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def lines(values: Any) -> str:
    values = values if isinstance(values, list) else [values]
    return "".join(json.dumps(value) + "\n" for value in values)


@given(
    st.one_of(
        mutated(LINES, VALUES).map(lambda x: ("metrics.jsonl", lines(x).encode())),
        mutated(RECORD, VALUES).map(lambda x: ("run.json", json.dumps(x).encode())),
        mutated(TEXTS, VALUES).map(lambda x: ("generations.jsonl", lines(x).encode())),
        st.tuples(
            st.sampled_from(["metrics.jsonl", "run.json", "generations.jsonl"]),
            st.binary(max_size=12),
        ),
    )
)
@examples(50)
def test_fuzz_folders_of_runs(folder, spoilt):
    (folder / "metrics.jsonl").write_text(lines(LINES))
    (folder / "run.json").write_text(json.dumps(RECORD))
    (folder / "generations.jsonl").write_text(lines(TEXTS))
    name, data = spoilt
    (folder / name).write_bytes(data)

    found = one_line_or_success(report.main, [str(folder)])
    if isinstance(found, str):
        assert found.startswith(str(folder))
    else:
        assert found.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
