"""`dpo inspect` on a small model and its data, from the command line."""

import json
import re
from pathlib import Path

import pytest

from engine.cli import main
from tests.json_lines import read_lines

FIXTURE = Path(__file__).parents[1] / "fixtures" / "trl" / "chat"
EXPECTED = """\
--- training data --------------------------------------------------------------
source      train.jsonl: 19 rows
pairs       18, of 19 rows
dropped     1 pair (5.3%): cut away (the first: row 18)
"""


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    """18 rows, one that no length leaves anything of; two of them in the evaluation."""
    monkeypatch.chdir(tmp_path)
    rows = read_lines(FIXTURE / "data.jsonl")
    long = json.loads(json.dumps(rows[0]))
    long["prompt"][-1]["content"] = "The window. " * 50
    for name, lines in (("train", [*rows, long]), ("eval", rows[:2])):
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    Path("run.yaml").write_text(
        "config:\n"
        f"  model: {{name_or_path: {FIXTURE / 'model'}}}\n"
        "  mixture: {informs: [{data_files: train.jsonl}]}\n"
        "  eval_mixture: {informs: [{data_files: eval.jsonl}]}\n"
        "  trainer: {max_length: 60, save_directory: out}\n"
    )
    return "run.yaml"


def inspect(capsys, *words) -> str:
    assert main(["inspect", *words]) == 0
    return capsys.readouterr().out


def test_the_whole_report(run_file, capsys):
    said = inspect(capsys, run_file, "--rows", "0,18")
    assert max(map(len, said.splitlines())) <= 80
    assert said.isascii() and "\x1b" not in said
    assert EXPECTED in said
    titles = re.findall("^--- (.*?) -", said, flags=re.M)
    assert titles == [
        "rows of the training data as tokens",
        "row 0, pair 0",
        "row 18 (dropped)",
        "training data",
        "evaluation data",
        "batches",
        "warnings",
    ]
    assert "  scored    |" in said and "  cut       |" in said
    flat = " ".join(said.split())
    assert "leaked the pairs of 2 (100.0%) are in the training data too" in flat
    assert "1 of 19 pairs are dropped (the first: train.jsonl, row 18" in flat
    assert "steps 6 batches of 16 pairs, 2 an epoch" in flat
    # The template ends turns with <|end|>, and the model's files do not say so.
    assert "training data: 17 of 18 pairs (the first: train.jsonl, row 0" in flat
    assert "a scored token that ends generation ('</s>')" in flat
    assert "drawn in out/inspect/lengths.png" in flat
    found = sorted(path.name for path in Path("out").rglob("*"))
    assert found == ["eval_lengths.png", "inspect", "lengths.png"]


def test_what_is_shown_is_chosen(run_file, capsys):
    said = inspect(capsys, "--no-plots", run_file, "--num", "2", "--ids")
    assert re.findall("^--- row (\\d+)", said, flags=re.M) == ["0", "18"]
    assert re.search(r"\|\d+:<\|start\|>", said) and not Path("out").exists()
    words = ["--eval", "--rows", "1,0,1", "trainer.max_length=2000", "--plots", "plots"]
    said = inspect(capsys, run_file, *words)
    assert re.findall("^--- row (\\d+)", said, flags=re.M) == ["1", "0"]
    assert "rows of the evaluation data" in said and "pairs       19, of 19" in said
    assert not Path("out").exists() and len(list(Path("plots").iterdir())) == 2
    said = inspect(capsys, run_file, "--num", "0", "--no-plots")
    assert "--- row" not in said


def test_what_training_would_refuse_comes_after_the_data(run_file, capsys):
    words = ["--num", "0", "--no-plots", "trainer.warmup_steps=100"]
    assert main(["inspect", run_file, *words]) == 2
    out, err = capsys.readouterr()
    assert EXPECTED in out and "--- warnings" in out
    assert "dpo: error: warmup_steps=100 must be less than" in err


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--rows", "19"], "--rows: there is no row 19; the mixture has 19 rows"),
        (["--rows", "1,x"], "--rows: 'x' is no number"),
        (["--num", "-1"], "--num: '-1' is no number"),
        (["--rows", "1", "--num", "1"], "not allowed with argument"),
        (["--eval", "eval_mixture=null"], "--eval: the run file has no eval_mixture"),
        (["--nmu"], "unrecognized arguments: --nmu; see `dpo inspect --help`"),
        (["trainer.bta=1"], "did you mean 'trainer.beta'?"),
        (["trainer.max_length=2"], "none of the 19 pairs has a token to score"),
        (["trainer.save_directory=."], "save_directory='.' is, or holds, the folder"),
    ],
)
def test_bad_input(run_file, capsys, words, expected):
    assert main(["inspect", run_file, *words]) == 2
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("dpo: error: ")]
    assert expected in line


def test_plots_of_somebody_else_stay(run_file, capsys):
    Path("out/inspect").mkdir(parents=True)
    Path("out/inspect/lengths.png").write_text("notes")
    assert main(["inspect", run_file, "--num", "0"]) == 2
    assert "is not a plot of `dpo inspect`" in capsys.readouterr().err
    assert Path("out/inspect/lengths.png").read_text() == "notes"


def test_without_matplotlib(run_file, capsys, monkeypatch):
    monkeypatch.setattr(
        "engine.inspection.plots.importlib.util.find_spec", lambda name: None
    )
    words = [run_file, "--num", "0"]
    assert "drawn in    no file: matplotlib is not installed" in inspect(capsys, *words)
    assert main(["inspect", *words, "--plots", "plots"]) == 2
    assert "--plots plots: matplotlib is not installed" in capsys.readouterr().err


def test_no_run_file_and_help(capsys):
    assert main(["inspect"]) == 2
    assert "no run file; write `dpo inspect run.yaml`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["inspect", "--help"])
    assert "--rows 0,5,17" in capsys.readouterr().out
