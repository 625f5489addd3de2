"""`docs/config.md` is what the code says, and leaves nothing out."""

import re
from pathlib import Path

import pytest

from engine.config import options
from engine.config.columns import ColumnsConfig
from engine.config.dpo import DPOConfig
from engine.config.run import RunConfig
from engine.config.run_file import dotted_keys
from engine.objective.losses import LOSSES

PAGE = Path(__file__).parents[3] / "docs" / "config.md"


def test_the_page_is_current():
    expected = options.page()
    assert PAGE.read_text(encoding="utf-8") == expected, (
        "write it anew: python -m engine.config.options > docs/config.md"
    )


def test_every_option_is_there_with_its_meaning():
    found = {
        option.name: option
        for cls in options._SECTIONS.values()
        for option in options.options(cls)
    }
    names = {key.split(".")[-1] for key in dotted_keys(RunConfig)} - {"0"}
    assert names <= set(found)
    columns = {option.name for option in options.options(ColumnsConfig)}
    without = {name for name, x in found.items() if not x.meaning} - columns
    assert without == set(), "give these fields a comment"


def test_what_the_guide_to_faults_names_is_there():
    known = {
        key for line in dotted_keys(RunConfig) for key in (line, line.split(".")[-1])
    }
    known |= set(LOSSES) | {"lion", "adafactor", "xla", "scoring", "memory", "none"}
    text = (PAGE.parent / "troubleshooting.md").read_text(encoding="utf-8")
    words = re.findall(r"`([a-z_.]+)(?:=[^`]*)?`", text)
    metrics = {"grad_norm"}
    assert set(words) - known - metrics == set() and len(words) > 30


@pytest.mark.parametrize(
    "name, values, default, meaning",
    [
        ("total_batch_size", "whole number", "`16`", "pairs of one optimizer step"),
        ("eval_steps", "whole number, null", "`null`", "at the end only"),
        ("score", "`completion`, `assistant`, `last_turn`", "`completion`", "scored:"),
        ("tools", "a list of mapping, null", "`null`", "for the chat template"),
        ("workspace_bytes", "whole number", "`268435456`", "bound on its temporaries"),
    ],
)
def test_what_a_row_says(name, values, default, meaning):
    found = {option.name: option for option in options.options(DPOConfig)}[name]
    assert (found.values, found.default) == (values, default)
    assert meaning in found.meaning and "None" not in found.meaning
