"""What a user can get wrong ends in one line and exit code 2, before any training."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine.cli import main

FIXTURE = Path(__file__).parents[1] / "fixtures" / "trl" / "text"
ROOT = Path(__file__).parents[2]
COMMANDS = ("validate", "train")
ROWS = [json.loads(line) for line in (FIXTURE / "data.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """What `dpo validate` and `dpo train` both say of a run file, in their one line."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURE / "model", "model")

    def write(rows: list | bytes) -> None:
        text = rows if isinstance(rows, bytes) else "\n".join(map(json.dumps, rows))
        Path("pairs.jsonl").write_bytes(
            text.encode() if isinstance(text, str) else text
        )

    def refusal(command: str, *overrides: str) -> str:
        assert main([command, "run.yaml", *overrides]) == 2
        lines = capsys.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("dpo: error: ")]
        assert errors == lines[-1:]
        assert not Path("out").exists()  # nothing was written
        return errors[0].removeprefix("dpo: error: ")

    def go(
        *overrides: str, rows: list | bytes = ROWS, commands=COMMANDS, **sections: dict
    ) -> str:
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
        first, *others = (refusal(command, *overrides) for command in commands)
        assert others == [first] * len(others)
        return first

    return go


def without(row: dict, field: str) -> dict:
    return {name: value for name, value in row.items() if name != field}


def test_a_missing_column(run):
    assert run(rows=[without(row, "rejected") for row in ROWS]) == (
        "pairs.jsonl has no column 'rejected'; it has prompt, chosen, and needs "
        "chosen, "
        "rejected and (unless both start with it) prompt: rename its columns, or say "
        "what they are called in the run file (columns)"
    )


def test_a_prompt_that_is_no_string(run):
    assert run(rows=[ROWS[0], ROWS[1] | {"prompt": 7}]) == (
        "pairs.jsonl, row 1 (counting from 0), field 'prompt', is 7 (a int); it "
        "must be "
        "text or a list of messages: correct the row or leave it out"
    )


def test_an_empty_file(run):
    said = "pairs.jsonl is empty; give at least one preference pair"
    assert run(rows=b"") == run(rows=b"\n \n") == said


def test_a_file_that_is_no_json(run):
    assert run(rows=json.dumps(ROWS[0]).encode() + b"\n{not json\n") == (
        "pairs.jsonl, line 2, is not JSON (Expecting property name enclosed in double "
        "quotes, column 2); write one object a line, or one list of objects"
    )


def test_a_file_of_another_encoding(run):
    row = {"prompt": "caf\u00e9?", "chosen": " yes", "rejected": " no"}
    assert run(rows=json.dumps(row, ensure_ascii=False).encode("latin-1")) == (
        "pairs.jsonl, line 1, byte 16, is not UTF-8 text (0xe9); save the file as UTF-8"
    )


def test_half_a_character(run):
    assert run(rows=[ROWS[0], ROWS[1] | {"chosen": "a\ud83d"}]) == (
        "pairs.jsonl, row 1 (counting from 0), field 'chosen', has half a character "
        "(\\ud83d, a surrogate on its own), which no tokenizer takes; mend the text, "
        "which was cut or decoded wrongly"
    )


def test_a_row_of_a_table_that_is_wider_than_its_header(run):
    rows = b"prompt,chosen,rejected\nWell, tea?,Green,Black\nCup?,Big,Small\n"
    source = {"type": "csv", "data_files": "pairs.jsonl"}
    assert run(rows=rows, mixture={"informs": [source]}) == (
        "pairs.jsonl, line 2: 4 cells ('Well', ' tea?', 'Green', ...) under a "
        "header of "
        "3 (prompt, chosen, rejected); put a cell that holds a comma in double quotes: "
        '"Well, yes"'
    )


def test_a_missing_file(run):
    source = {"type": "json", "data_files": "nowhere.jsonl"}
    assert run(mixture={"informs": [source]}) == (
        f"nowhere.jsonl does not exist (from {Path.cwd()})"
    )


def test_nothing_left_to_score(run):
    assert run("trainer.max_length=2") == (
        f"none of the {len(ROWS)} pairs has a token to score: of {len(ROWS)}, "
        "max_length=2 (keep_start) leaves nothing to score; raise max_length, set "
        "max_prompt_length below it, or use keep_end"
    )


def test_an_unknown_key(run):
    assert run(trainer={"learning_rat": 1e-3}) == (
        "run.yaml: unknown key trainer.learning_rat; did you mean "
        "'trainer.learning_rate'?"
    )


def test_a_key_of_another_trainer(run):
    assert run("trainer.max_steps=3") == (
        "command line: unknown key trainer.max_steps; here it is "
        "'trainer.max_training_steps'"
    )


def test_an_unknown_loss(run):
    line = run("trainer.loss_type=sigmoyd")
    assert line.startswith("command line: trainer.loss_type='sigmoyd' must be one of ")
    assert "ipo" in line and line.endswith("; did you mean 'sigmoid'?")


def test_a_batch_that_the_mesh_does_not_divide(run):
    assert run("trainer.total_batch_size=12") == (
        "total_batch_size=12 pairs cannot be split over 8 devices (data * fsdp) times "
        "1 accumulation steps; make it a multiple of 8"
    )


def test_a_batch_that_accumulation_does_not_divide(run):
    assert run("trainer.gradient_accumulation_steps=3") == (
        "run.yaml: trainer.total_batch_size=8 must be a multiple of "
        "gradient_accumulation_steps=3"
    )


@pytest.mark.parametrize("size", [3, 2**63 - 1])
def test_a_mesh_that_the_devices_do_not_fill(run, size):
    assert run(f"sharding.fsdp={size}") == (
        f"sharding: data=1, fsdp={size}, tensor=1 does not fit 8 devices; the product "
        "must be 8"
    )


def test_a_sequence_that_the_devices_or_the_model_cannot_have(run):
    assert run("sharding.sequence=3") == (
        "sharding: data=1, fsdp=-1, sequence=3, tensor=1 does not fit 8 devices; the "
        "product must be 8"
    )
    assert run("sharding.sequence=2", "trainer.attention=splash") == (
        "attention='splash' cannot be: it is for TPUs, and the devices are of platform "
        "cpu; use auto or tiles"
    )


def test_a_mesh_that_does_not_divide_the_model(run):
    assert run("sharding.tensor=8", "sharding.fsdp=1") == (
        "sharding: tensor=8 does not divide the model's num_attention_heads=4; use a "
        "divisor of 4"
    )


def test_a_vocabulary_smaller_than_the_tokenizers(run):
    path = Path("model/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    line = run()
    # The weights are of the old size: whichever is seen first, it names the sizes.
    assert line.startswith("model") and "100" in line and "435" in line


def test_a_token_that_the_model_does_not_have(tmp_path):
    """Seen from Python, where tokenizer and model come apart most easily."""
    import numpy as np
    from transformers import AutoTokenizer

    from engine.data.tokenization import PairTokens
    from engine.errors import InputError
    from engine.models import parse_hf_config
    from engine.training.checks import check_vocabulary

    tokenizer = AutoTokenizer.from_pretrained(FIXTURE / "model")
    config = json.loads((FIXTURE / "model" / "config.json").read_text())
    pairs = PairTokens(
        tokens=np.array([1, 2, 460, 1, 2, 3], np.int32),
        scored=np.array([0, 1, 1, 0, 1, 1], np.bool_),
        offsets=np.array([0, 3, 6]),
        completion_start=np.array([1, 1], np.int32),
        rows=np.array([0]),
        weights=np.ones(1, np.float32),
    )
    with pytest.raises(InputError, match="has no token 460"):
        check_vocabulary(parse_hf_config(config), tokenizer, pairs)
    small = parse_hf_config(config | {"vocab_size": 50})
    with pytest.raises(InputError, match="vocab_size=50 is smaller than the tokenizer"):
        check_vocabulary(small, tokenizer)


def test_a_truncated_safetensors_file(run):
    path = Path("model/model.safetensors")
    path.write_bytes(path.read_bytes()[:5000])
    assert run().startswith("model/model.safetensors: not a whole safetensors file (")


def test_a_save_directory_that_is_the_models_own(run):
    line = run("trainer.save_directory=./model/")
    assert "is the directory of model.name_or_path='model'" in line


def test_a_save_directory_that_holds_the_data(run):
    for where in (".", "model/.."):
        assert run(f"trainer.save_directory={where}") == (
            f"save_directory='{where}' is, or holds, the folder of mixture.informs.0."
            "data_files='pairs.jsonl'; what is saved would lie among the data; give "
            "another save_directory"
        )


def test_a_save_directory_that_is_a_file(run):
    assert "save_directory='pairs.jsonl' is a file" in run(
        "trainer.save_directory=pairs.jsonl"
    )


def test_a_save_directory_with_somebody_elses_model(run):
    shutil.copytree("model", "another")
    line = run("trainer.save_directory=another")
    assert "has model.safetensors" in line and "another" in line


def test_a_model_that_is_not_there(run):
    line = run("model.name_or_path=no-such-model")
    assert line.startswith("model 'no-such-model': there is no such directory, and ")


def test_a_model_without_a_tokenizer(run):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("model", name).unlink()
    line = run()
    assert line.startswith("model: ") and "tokenizer" in line


def test_an_unsupported_architecture(run):
    path = Path("model/config.json")
    config = json.loads(path.read_text()) | {"model_type": "mixtral"}
    path.write_text(json.dumps(config))
    assert run().startswith(
        "model: config.json: model_type 'mixtral' is not supported; allowed: llama, "
    )


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
    assert run("trainer.implementation=cuda") == (
        "command line: trainer.implementation='cuda' must be one of auto, mosaic_gpu, "
        "pallas_tpu, triton, xla"
    )


@pytest.mark.parametrize("platform", ["cuda", "abacus"])
def test_a_device_that_is_not_there(run, platform):
    """In a process of its own, as JAX looks for devices once."""
    run("trainer.workspace_bytes=1000")  # writes run.yaml
    done = subprocess.run(
        [sys.executable, "-m", "engine", "train", "run.yaml"],
        env=os.environ | {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert last.startswith(f"dpo: error: JAX_PLATFORMS='{platform}' cannot be used: ")
    assert not Path("out").exists()
