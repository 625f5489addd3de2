"""Training on a stream, from the command line and from Python."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from engine.cli import main
from engine.commands import train  # noqa: F401
from engine.config.run import ShardingConfig
from tests.engine.training.runs import FIXTURE, ROWS, make_trainer, one_device
from tests.json_lines import read_lines

RUN = """\
config:
  model: {{name_or_path: {model}, dtype: float32}}
  mixture:
    streaming: true
    shuffle_buffer_size: {buffer}
    informs: [{{data_files: pairs.jsonl}}]
  sharding: {{fsdp: 1}}
  trainer:
    {{max_length: 32, max_training_steps: 7, total_batch_size: 4, log_steps: 1,
     learning_rate: 1e-3, save_directory: out}}
"""


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ShardingConfig, "mesh", lambda _: one_device())
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def write(buffer: int = 1) -> str:
        Path("run.yaml").write_text(RUN.format(model=FIXTURE / "model", buffer=buffer))
        return "run.yaml"

    return write


def without_times(path: str) -> list[dict]:
    return [
        {k: v for k, v in line.items() if not k.startswith("perf/")}
        for line in read_lines(Path(path))
    ]


def test_a_stream_trains_as_the_data_set_does(run_file, tmp_path):
    """In its own order: the same batches, over the end of a pass, padded otherwise."""
    assert main(["train", run_file(), "trainer.save_directory=out"]) == 0
    streamed = without_times("out/metrics.jsonl")
    make_trainer(
        tmp_path / "held",
        evaluate=False,
        train_dataset=ROWS,
        shuffle_train_dataset=False,
        max_length=32,
        max_training_steps=7,
        log_steps=1,
    ).train()
    held = without_times("held/metrics.jsonl")
    assert len(held) == len(streamed) == 7
    for one, other in zip(streamed, held, strict=True):
        assert one["num_tokens"] == other["num_tokens"]
        assert one["epoch"] == (other["epoch"] if other["epoch"] >= 1 else 0)
        # Sums of log-probabilities of up to about 200 nats, rounded in another order.
        assert one["loss"] == pytest.approx(other["loss"], abs=200 * 2**-22)
        for name in ("logps/chosen", "logps/rejected"):
            assert one[name] == pytest.approx(other[name], rel=2**-18)


def test_a_data_set_of_python_is_streamed(tmp_path):
    data = Dataset.from_list(ROWS).to_iterable_dataset()
    trainers = [
        make_trainer(
            tmp_path,
            evaluate=False,
            train_dataset=data,
            max_training_steps=9,
            seed=seed,
        )
        for seed in (1, 1, 2)
    ]
    one, same, other = (list(trainer.plan.batches()) for trainer in trainers)
    assert len(one) == 9
    for (a, _), (b, _) in zip(one, same, strict=True):
        assert a.shape in trainers[0].plan.shapes
        np.testing.assert_array_equal(a.rows.tokens, b.rows.tokens)
    assert not np.array_equal(one[0][0].rows.tokens, other[0][0].rows.tokens)


def test_a_bad_row_ends_a_run_with_its_name(run_file, capsys, monkeypatch):
    class Reads:
        """Takes each batch, and no step."""

        def __init__(self, run, *models, **config):
            self.run, self.taken = run, 0

        def train(self):
            for _ in self.run.plan.batches():
                self.taken += 1
                print(self.taken)

    monkeypatch.setattr(sys.modules["engine.commands.train"], "Trainer", Reads)
    with open("pairs.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in 10 * ROWS)
        file.write('{"prompt": "p", "chosen": "c"}\n')
    steps = "trainer.max_training_steps=1000"
    assert main(["train", run_file(), steps]) == 2
    number = 11 * len(ROWS)
    out, err = capsys.readouterr()
    said = err.splitlines()[-1]
    assert said.startswith(
        f"dpo: error: pairs.jsonl, row {number} (counting from 0), has no 'rejected'"
    )
    assert int(out.split()[-1]) >= 20  # of about 55 that come before it


def test_validate_looks_at_the_first_rows(run_file, capsys):
    with open("pairs.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in 10 * ROWS)
        file.write("no JSON\n")
    assert main(["validate", run_file()]) == 0
    said = capsys.readouterr().out
    assert "train       streamed; only the first 128 rows are checked here: 12" in said
    assert "of 4 pairs, a row for each sequence, padded to 32 (256 scored a" in said
    assert "steps       7\n" in said
    Path("pairs.jsonl").write_text("no JSON\n")
    assert main(["validate", run_file()]) == 2
    assert "pairs.jsonl, line 1, is not JSON" in capsys.readouterr().err


def test_inspect_looks_at_the_first_rows(run_file, capsys):
    assert main(["inspect", run_file(), "--num", "1", "--no-plots"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    number = len(ROWS)
    assert f"source pairs.jsonl: {number} rows" in said
    assert "steps 7 batches of 4 pairs, streamed" in said
    assert f"of the batches of the first {number} rows: rows of 32 tokens" in said
    assert f"the training data is streamed: its first {number} rows are looked" in said
