"""What a user can get wrong ends in one line and exit code 2, before any training."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from engine.cli import main

FIXTURE = Path(__file__).parents[1] / "fixtures" / "trl" / "text"
ROWS = [json.loads(line) for line in (FIXTURE / "data.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `dpo train` on a small run file, changed by the test; its one line."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURE / "model", "model")

    def write(rows: list | str) -> None:
        lines = rows if isinstance(rows, str) else "\n".join(map(json.dumps, rows))
        Path("pairs.jsonl").write_text(lines)

    def go(*overrides: str, rows: list | str = ROWS, **sections: dict) -> str:
        write(rows)
        source = {"type": "json", "data_files": "pairs.jsonl"}
        config = {
            "model": {"name_or_path": "model", "dtype": "float32"},
            "mixture": {"informs": [source]},
            "sharding": {"data": 1, "fsdp": -1, "tensor": 1},
            "trainer": {"save_directory": "out", "total_batch_size": 8},
        }
        for name, changes in sections.items():
            config[name] = config[name] | changes
        Path("run.yaml").write_text(yaml.safe_dump({"config": config}))
        assert main(["train", "run.yaml", *overrides]) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        errors = [line for line in lines if line.startswith("dpo: error: ")]
        assert len(errors) == 1 and errors[0] == lines[-1]
        assert not Path("out").exists()  # nothing was written
        return errors[0]

    return go


def without(row: dict, field: str) -> dict:
    return {name: value for name, value in row.items() if name != field}


def test_a_missing_column(run):
    line = run(rows=[without(row, "rejected") for row in ROWS])
    assert "pairs.jsonl" in line and "rejected" in line


def test_a_prompt_that_is_no_string(run):
    line = run(rows=[ROWS[0], ROWS[1] | {"prompt": 7}])
    assert "pairs.jsonl" in line and "prompt" in line
    assert "row 1" in line or "row 2" in line


def test_an_empty_file(run):
    assert "pairs.jsonl" in run(rows="")


def test_a_file_that_is_no_json(run):
    assert "pairs.jsonl" in run(rows="{not json\n")


def test_a_missing_file(run):
    source = {"type": "json", "data_files": "nowhere.jsonl"}
    assert "nowhere.jsonl" in run(mixture={"informs": [source]})


def test_nothing_left_to_score(run):
    assert "max_length" in run("trainer.max_length=2")


def test_an_unknown_key(run):
    line = run(trainer={"learning_rat": 1e-3})
    assert "learning_rat" in line and "learning_rate" in line and "run.yaml" in line


def test_an_unknown_loss(run):
    line = run("trainer.loss_type=sigmoyd")
    assert "sigmoyd" in line and "sigmoid" in line and "ipo" in line


def test_a_batch_that_the_mesh_does_not_divide(run):
    line = run("trainer.total_batch_size=12")
    assert "12 pairs" in line and "8 devices" in line and "multiple of 8" in line


def test_a_batch_that_accumulation_does_not_divide(run):
    assert "gradient_accumulation_steps=3" in run(
        "trainer.gradient_accumulation_steps=3"
    )


def test_a_mesh_that_the_devices_do_not_fill(run):
    assert "8 devices" in run("sharding.fsdp=3")


def test_a_mesh_that_does_not_divide_the_model(run):
    line = run("sharding.tensor=8", "sharding.fsdp=1")
    assert "tensor=8" in line and "num_attention_heads" in line


def test_a_vocabulary_smaller_than_the_tokenizers(run):
    path = Path("model/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    line = run()
    # The weights are of the old size: whichever is seen first, it names the sizes.
    assert "100" in line


def test_a_token_that_the_model_does_not_have(tmp_path):
    """Seen from Python, where tokenizer and model come apart most easily."""
    import numpy as np
    from transformers import AutoTokenizer

    from engine.data.tokenization import PairTokens
    from engine.errors import InputError
    from engine.models import parse_hf_config
    from engine.training.prepare import check_vocabulary

    tokenizer = AutoTokenizer.from_pretrained(FIXTURE / "model")
    config = json.loads((FIXTURE / "model" / "config.json").read_text())
    pairs = PairTokens(
        tokens=np.array([1, 2, 460, 1, 2, 3], np.int32),
        offsets=np.array([0, 3, 6]),
        score_start=np.array([1, 1], np.int32),
        rows=np.array([0]),
        dropped=0,
    )
    with pytest.raises(InputError, match="has no token 460"):
        check_vocabulary(parse_hf_config(config), tokenizer, pairs)
    small = parse_hf_config(config | {"vocab_size": 50})
    with pytest.raises(InputError, match="vocab_size=50 is smaller than the tokenizer"):
        check_vocabulary(small, tokenizer)


def test_a_truncated_safetensors_file(run):
    path = Path("model/model.safetensors")
    path.write_bytes(path.read_bytes()[:5000])
    assert "model.safetensors" in run()


def test_a_model_that_is_not_there(run):
    assert "no-such-model" in run("model.name_or_path=no-such-model")


def test_a_model_without_a_tokenizer(run):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("model", name).unlink()
    line = run()
    assert "tokenizer" in line


def test_an_unsupported_architecture(run):
    path = Path("model/config.json")
    config = json.loads(path.read_text()) | {"model_type": "mixtral"}
    path.write_text(json.dumps(config))
    assert "mixtral" in run()


def test_a_reference_with_another_vocabulary(run):
    shutil.copytree("model", "other")
    models = Path(__file__).parents[1] / "fixtures" / "models" / "llama"
    for name in ("config.json", "model.safetensors"):
        shutil.copy(models / name, Path("other", name))
    line = run("reference_model.name_or_path=other")
    assert "reference_model" in line and "vocabulary" in line


def test_a_workspace_that_nothing_fits_in(run):
    line = run("trainer.workspace_bytes=1000")
    assert "workspace_bytes=1000" in line and "give at least" in line


def test_an_unknown_implementation_of_the_op(run):
    line = run("trainer.implementation=cuda")
    assert "implementation" in line and "cuda" in line and "xla" in line
