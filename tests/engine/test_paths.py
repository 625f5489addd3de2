"""One function reads every path: `~`, patterns, and names that look like patterns."""

from pathlib import Path

import pytest

from engine.config.dpo import DPOConfig
from engine.config.run import (
    MixtureConfig,
    ModelConfig,
    ReferenceConfig,
    SourceConfig,
    load_run_config,
)
from engine.paths import as_path, expand, is_url, matching_files


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "home")


def test_a_tilde_at_the_start_is_the_home_directory(home):
    assert expand("~/a/b") == f"{home}/a/b"
    assert expand("~") == home
    assert as_path(Path("~/a")) == Path(home, "a")
    for same in ("a~/b", "./~", "org/model", "hf://a/~b", "~no-such-user/a"):
        assert expand(same) == same
    assert is_url("hf://a/b") and not is_url("a/b")


def test_every_path_of_a_run_is_expanded(home):
    assert DPOConfig(save_directory="~/out").save_directory == f"{home}/out"
    model = ModelConfig(name_or_path="~/m", tokenizer="~/t")
    assert (model.name_or_path, model.tokenizer) == (f"{home}/m", f"{home}/t")
    assert ModelConfig(name_or_path="org/m").tokenizer is None
    assert ReferenceConfig(name_or_path="~/r").name_or_path == f"{home}/r"
    one, two = SourceConfig(data_files="~/a"), SourceConfig(data_files=("~/a", "b"))
    assert (one.data_files, two.data_files) == (f"{home}/a", (f"{home}/a", "b"))
    mixture = MixtureConfig(informs=(one,), cache_dir="~/c")
    assert mixture.cache_dir == f"{home}/c"


def test_a_run_file_at_home(home):
    text = "config: {model: {name_or_path: m}, mixture: {informs: [{data_files: ~/a}]}}"
    Path(home, "run.yaml").write_text(text)
    run = load_run_config("~/run.yaml")
    assert run.mixture.informs[0].data_files == f"{home}/a"


def test_a_name_comes_before_a_pattern(home):
    for name in ("run7.csv", "run8.csv", "run[7].csv"):
        Path(name).touch()
    assert matching_files("run[7].csv") == ["run[7].csv"]
    assert matching_files("run[78].csv") == ["run7.csv", "run8.csv"]
    assert matching_files("run[9].csv") == []
    Path(home, "a.csv").touch()
    assert matching_files("~/*.csv") == [f"{home}/a.csv"]
