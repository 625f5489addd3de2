"""`dpo show`: what is printed is the same run, and says where values come from."""

import re
from pathlib import Path

import pytest

from engine.cli import main
from engine.config.run import load_run_config

ROOT = Path(__file__).parents[3]
RUN = """\
config:
  model:
    name_or_path: "m: #1"
  defaults: &defaults {split: test, num_rows: 3}
  mixture:
    informs:
      - data_files: [a.jsonl, "*.json"]
      - data_files: b.jsonl
        split: train[:5%]
        columns: {prompt: question}
    mixture_weights: [1, 2.5]
  lora: {r: 4}
  trainer:
    learning_rate: 5e-7
    loss_type: [sigmoid, sft]
    loss_weights: [1.0, 0.5]
    lr_scheduler_type: cosine_with_min_lr
    lr_scheduler_kwargs: {min_lr_rate: 0.1}
    tools: [{name: "look: up"}]
actions: [train]
"""


@pytest.fixture
def shown(tmp_path, monkeypatch, capsys):
    """What `dpo show run.yaml` prints, with overrides."""
    monkeypatch.chdir(tmp_path)

    def show(*overrides: str, text: str = RUN) -> str:
        Path("run.yaml").write_text(text)
        assert main(["show", "run.yaml", *overrides]) == 0
        return capsys.readouterr().out

    return show


def said(text: str, name: str) -> list[str]:
    """The values of an option, each with its comment."""
    found = re.findall(rf"^ *(?:- )?{name}: (.*\S) +# (.*)$", text, re.MULTILINE)
    return [f"{value.strip()} <- {origin}" for value, origin in found]


WITHOUT_ANCHOR = re.sub(r"  defaults: .*\n", "", RUN)


def test_what_is_shown_is_the_same_run(shown, tmp_path):
    overrides = ["trainer.beta=0.2", "mixture.informs.0.split=test", "trainer.seed=7"]
    text = shown(*overrides, text=WITHOUT_ANCHOR)
    (tmp_path / "shown.yaml").write_text(text)
    expected = load_run_config("run.yaml", overrides)
    assert load_run_config("shown.yaml") == expected
    assert load_run_config("shown.yaml").trainer.beta == 0.2


def test_each_value_says_where_it_comes_from(shown):
    text = shown("trainer.beta=0.2", "mixture.seed=1", text=WITHOUT_ANCHOR)
    assert said(text, "name_or_path") == ["'m: #1' <- run.yaml:3"]
    assert said(text, "beta") == ["0.2 <- command line"]
    assert said(text, "learning_rate") == ["5.0e-07 <- run.yaml:13"]
    assert said(text, "max_length") == ["512 <- default"]
    assert said(text, "split") == ["train <- default", "train[:5%] <- run.yaml:8"]
    assert said(text, "prompt") == ["null <- default", "question <- run.yaml:9"]
    assert said(text, "seed") == ["1 <- command line", "42 <- default"]
    assert said(text, "r") == ["4 <- run.yaml:11"]
    assert said(text, "loss_weights") == ["[1.0, 0.5] <- run.yaml:15"]
    assert said(text, "actions") == ["[train] <- run.yaml:19"]
    assert said(text, "reference_model") == ["null <- default"]


def test_a_whole_section_from_the_command_line(shown):
    text = shown("lora={r: 2, lora_alpha: 6}", text=WITHOUT_ANCHOR)
    assert said(text, "r") == ["2 <- command line"]
    assert said(text, "lora_alpha") == ["6.0 <- command line"]


def test_values_of_an_anchor_have_the_line_where_they_stand(shown):
    text = shown(
        text="config:\n"
        "  model: {name_or_path: m}\n"
        "  mixture: &data\n"
        "    informs: [{data_files: a.jsonl}]\n"
        "    seed: 5\n"
        "  eval_mixture:\n"
        "    <<: *data\n"
        "    seed: 6\n"
    )
    assert said(text, "data_files") == ["a.jsonl <- run.yaml:4"] * 2
    assert said(text, "seed")[:2] == ["5 <- run.yaml:5", "6 <- run.yaml:8"]


def test_the_demo_is_shown_as_it_is(shown, monkeypatch, capsys, tmp_path):
    path = ROOT / "examples" / "demo" / "demo.yaml"
    assert main(["show", str(path)]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert load_run_config("shown.yaml") == load_run_config(path)


def test_what_is_wrong_is_one_line(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(RUN)
    assert main(["show", str(tmp_path / "run.yaml")]) == 2
    assert "unknown key defaults" in capsys.readouterr().err
