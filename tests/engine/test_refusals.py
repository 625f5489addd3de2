"""Everything that is wrong ends in one line and exit code 2, and changes no file.

Each case goes through `dpo validate` and `dpo train`, which say the same of it.
"""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cli import main
from engine.commands import xla_flags
from engine.errors import InputError
from tests.engine.checkpoints import contents
from tests.engine.refusals import ROWS, Case, prepare, refusal, rows
from tests.engine.refused_data import DATA
from tests.engine.refused_models import MACHINE, MODELS
from tests.engine.refused_runs import OPTIONS, RUN_FILES
from tests.engine.training.runs import compilations

ROOT = Path(__file__).parents[2]
CASES = {
    f"{kind}: {name}": case
    for kind, some in (
        ("run file", RUN_FILES),
        ("options", OPTIONS),
        ("data", DATA),
        ("model", MODELS),
        ("machine", MACHINE),
    )
    for name, case in some.items()
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, name):
    case = CASES[name]
    prepare(tmp_path, monkeypatch, case)
    said = refusal("validate", capsys, case.overrides)
    assert case.matches(said), said
    assert refusal("train", capsys, case.overrides) == said


def test_what_can_be_trained_on_but_is_not_meant(tmp_path, monkeypatch, capsys, caplog):
    """Single rows are told of, and all goes on."""
    same = ROWS[0] | {"rejected": ROWS[0]["chosen"]}
    case = Case("", lambda: rows(same, ROWS[1] | {"rejected": ""}))
    prepare(tmp_path, monkeypatch, case)
    assert main(["validate", "run.yaml"]) == 0
    assert capsys.readouterr().out.endswith("valid\n")
    assert (
        "1 of 5 rows (the first: pairs.jsonl, row 3 (counting from 0)) have the same "
        "tokens in chosen and rejected" in caplog.text
    )
    assert (
        "1 of 5 rows (the first: pairs.jsonl, row 4 (counting from 0)) have an answer "
        "without text" in caplog.text
    )


def test_validate_reads_no_weight_and_compiles_nothing(tmp_path, monkeypatch, capsys):
    prepare(tmp_path, monkeypatch, Case(""))
    monkeypatch.setattr("engine.models.reader.Reader.read", None)
    before = contents(Path())
    with compilations() as compiled:
        assert main(["validate", "run.yaml"]) == 0
    assert compiled == [] and contents(Path()) == before


def test_a_disk_without_space_is_seen_before_training(tmp_path, monkeypatch, capsys):
    prepare(tmp_path, monkeypatch, Case(""))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("engine.models.save_directory._try_to_write", full)
    said = refusal("validate", capsys, ())
    assert said.startswith("save_directory='out' cannot be written: [Errno 28] No sp")
    assert refusal("train", capsys, ()) == said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--xla_none=1 --xla_cpu_enable_fast_math=true", "Unknown flag...--xla_none=1"),
        ("--xla_cpu_enable_fast_math=maybe", "Couldn't interpret value maybe for flag"),
        ("nowhere.txt", 'Could not open file "nowhere.txt"'),
    ],
)
def test_flags_that_xla_would_end_the_process_over(flags, said):
    with pytest.raises(InputError) as error:
        xla_flags.check(flags)
    line = str(error.value)
    assert Case(f"XLA_FLAGS={flags!r} cannot be used: ...{said}").matches(line), line
    assert line.endswith("; correct the environment variable, or unset it")


def test_flags_that_xla_knows():
    xla_flags.check("--xla_cpu_enable_fast_math=true")


def test_flags_are_read_before_jax(tmp_path):
    """In a process of its own, as JAX reads them once."""
    done = subprocess.run(
        [sys.executable, "-m", "engine", "show", "none.yaml"],
        env=os.environ | {"XLA_FLAGS": "--xla_none=1", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("dpo: error: XLA_FLAGS='--xla_none=1' cannot be used")
    assert done.stderr.count("\n") == 1
