"""The reference scored once: the same numbers, kept on disk, in no memory."""

import json
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engine import load_model
from engine.cli import main
from engine.data.logps_cache import StoredLogps
from engine.errors import InputError
from tests.engine.tiny_models import mesh_of
from tests.engine.training.runs import FIXTURE, ROWS, SHORT, make_trainer
from tests.json_lines import read_lines

pytestmark = pytest.mark.usefixtures("shared_programs")

EPS = float(np.finfo(np.float32).eps)
VALUES = {"ref_chosen_logps": -20.0, "ref_rejected_logps": -30.5}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))


def another_model(sizes):
    """A reference that is not the policy."""
    model = load_model(FIXTURE / "model", mesh=mesh_of(sizes), dtype="float32")
    scaled = jax.tree.map(lambda x: x * jnp.float32(1.05), nnx.state(model))
    nnx.update(model, scaled)
    return model


def lines(folder):
    return read_lines(folder / "metrics.jsonl")


def arguments_bytes(trainer):
    """What a training step is given, on one device."""
    assert trainer._programs._train is not None
    (program, *_) = trainer._programs._train.programs.values()
    return program.memory_analysis().argument_size_in_bytes


def model_bytes(model):
    """On one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(nnx.state(model))
    )


def test_it_gives_what_a_live_reference_gives_and_takes_no_memory(tmp_path):
    """Under accumulation, with a last batch that padding fills, and an evaluation."""
    sizes = (1, 2, 1, 2)
    options = {
        "total_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_training_steps": 3,
        "max_length": 16,  # one shape for all
        "max_prompt_length": 8,
        "log_steps": 1,
        "sizes": sizes,
    }
    live = make_trainer(
        tmp_path / "live", reference_model=another_model(sizes), **options
    )
    reference = another_model(sizes)
    size = model_bytes(reference)
    values = make_trainer(
        tmp_path / "values",
        reference_model=reference,
        precompute_ref_log_probs=True,
        **options,
    )
    assert all(x.is_deleted() for x in jax.tree.leaves(nnx.state(reference)))
    for trainer in (live, values):
        trainer.train()
    # A float32 for each of two sides, or four with their padding, is all that is added.
    assert arguments_bytes(values) <= arguments_bytes(live) - size + 64
    want, got = (lines(tmp_path / name) for name in ("live", "values"))
    assert len(want) == len(got) == 4
    for mine, theirs in zip(got, want, strict=True):
        prefix = "eval_" if "eval_loss" in mine else ""
        # Rewards are beta times a difference of sums of up to some 150 nats, which two
        # programs may round otherwise; the models drift apart by as much.
        nats = max(abs(theirs[f"{prefix}logps/{x}"]) for x in ("chosen", "rejected"))
        for name, value in theirs.items():
            if "perf" not in name:
                assert mine[name] == pytest.approx(value, rel=1e-5, abs=16 * EPS * nats)
    assert abs(want[0]["rewards/chosen"]) > 1e-2  # the reference is another one


def test_without_a_named_reference_no_second_copy_is_ever_made(tmp_path, monkeypatch):
    """The policy's own arrays are scored, before there is an optimizer's state."""
    monkeypatch.setattr("engine.training.trainer.make_reference", None)
    others = jax.live_arrays()  # held, so that none of their ids is used again
    before = {id(x) for x in others}
    trainer = make_trainer(
        tmp_path, evaluate=False, max_training_steps=1, precompute_ref_log_probs=True
    )
    size = model_bytes(trainer.model)
    held = sum(x.nbytes for x in jax.live_arrays() if id(x) not in before)
    assert 3 * size <= held < 3.5 * size  # the policy and AdamW's two moments
    trainer.train()
    line = lines(tmp_path)[0]
    bound = 0.1 * 4 * EPS * abs(line["logps/chosen"])
    assert abs(line["rewards/chosen"]) <= bound and line["loss"] == pytest.approx(
        np.log(2), abs=1e-5
    )


class Killed(BaseException):
    pass


def stored_pairs(cache):
    (folder,) = (cache / "reference").glob("*/*")
    found = []
    for path in folder.glob("*.npz"):
        with np.load(path) as file:
            found.append(file["pairs"])
    return found


def test_what_a_killed_run_has_scored_is_not_scored_again(
    tmp_path, monkeypatch, caplog
):
    """Pieces are on disk as they come; the next run, of other batches too, goes on."""
    options = {
        "evaluate": False,
        "max_training_steps": 1,
        "precompute_ref_log_probs": True,
    }
    monkeypatch.setattr("engine.data.logps_cache.SECONDS", 0.0)
    add, flush = StoredLogps.add, StoredLogps.flush
    scored = []

    def add_twice(self, pairs, values):
        if len(scored) == 2:
            # Nothing that is left to do is done, as after SIGKILL.
            monkeypatch.setattr(StoredLogps, "flush", lambda self: None)
            raise Killed
        scored.append(pairs)
        add(self, pairs, values)

    monkeypatch.setattr(StoredLogps, "add", add_twice)
    with pytest.raises(Killed):
        make_trainer(tmp_path / "a", **options)
    monkeypatch.setattr(StoredLogps, "flush", flush)
    first = np.concatenate(scored)
    assert sorted(np.concatenate(stored_pairs(tmp_path / "cache"))) == sorted(first)

    again = []

    def add_counting(self, pairs, values):
        again.append(pairs)
        add(self, pairs, values)

    monkeypatch.setattr(StoredLogps, "add", add_counting)
    caplog.set_level(logging.INFO)
    trainer = make_trainer(tmp_path / "b", **options)
    total = len(trainer.run.sets[""][0])
    assert f"the other {len(first)} are known from a run before" in caplog.text
    assert sorted(np.concatenate([first, *again])) == list(range(total))
    # All in one file now; a third run scores nothing, whatever its order.
    assert [len(x) for x in stored_pairs(tmp_path / "cache")] == [total]
    again.clear()
    third = make_trainer(tmp_path / "c", **options, seed=7)
    assert not again
    np.testing.assert_array_equal(
        third.run.sets[""][0].ref_logps, trainer.run.sets[""][0].ref_logps
    )


def test_values_of_other_weights_are_scored_anew(tmp_path, caplog):
    options: Any = {"evaluate": False, "precompute_ref_log_probs": True}
    caplog.set_level(logging.INFO)
    own = make_trainer(tmp_path, **options).run.sets[""][0].ref_logps
    assert "is of other weights" not in caplog.text
    other = (
        make_trainer(tmp_path, reference_model=another_model((1, 1, 1)), **options)
        .run.sets[""][0]
        .ref_logps
    )
    assert "what is kept of these pairs is of other weights" in caplog.text
    assert (own != other).all()


def with_values(rows, **more):
    return [row | VALUES | more for row in rows]


def test_columns_of_the_data_are_used_as_they_are(tmp_path, monkeypatch):
    """No reference is made, with no option set; rows that are dropped count as rows."""
    monkeypatch.setattr("engine.training.trainer.make_reference", None)
    trainer = make_trainer(
        tmp_path,
        train_dataset=with_values([*SHORT, ROWS[19]]),  # which is long
        eval_dataset=with_values(SHORT[:6]),
        max_training_steps=1,
        max_length=36,
    )
    assert trainer.run.sets[""][0].dropped == 1
    trainer.train()
    line = lines(tmp_path)[0]
    for side, value in (("chosen", -20.0), ("rejected", -30.5)):
        want = 0.1 * (line[f"logps/{side}"] - value)
        assert line[f"rewards/{side}"] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize(
    "train, evaluation, options, message",
    [
        (
            [*with_values(ROWS[:3]), ROWS[3]],
            None,
            {},
            r"row 3 \(counting from 0\), has no ref_chosen_logps, and another row has",
        ),
        (with_values(ROWS[:4], ref_rejected_logps=float("nan")), None, {}, "row 0 .*"),
        (with_values(ROWS[:4], ref_chosen_logps=3.0), None, {}, "must be .* at most 0"),
        (with_values(ROWS[:4], ref_chosen_logps="-3"), None, {}, "is not a number"),
        (
            with_values([ROWS[0] | {"rejected": [x["rejected"] for x in ROWS[:2]]}]),
            None,
            {"total_batch_size": 1},
            "row 0 .* has several pairs and one ref_rejected_logps",
        ),
        (with_values(ROWS), ROWS[:4], {}, "eval_dataset has no columns like .* or set"),
        (with_values(ROWS), None, {"sync_ref_model": True}, "no effect with sync_ref"),
        (with_values(ROWS), None, {"reference_free": True}, "with reference_free=True"),
        (
            with_values(ROWS),
            None,
            {"reference_model": FIXTURE / "model"},
            "reference_model has no effect, as the columns",
        ),
        (
            ROWS,
            None,
            {"precompute_ref_log_probs": True, "sync_ref_model": True},
            "other log-probabilities after each sync",
        ),
        (
            ROWS,
            None,
            {"precompute_ref_log_probs": True, "reference_free": True},
            "precompute_ref_log_probs=True has no effect with reference_free=True",
        ),
        (ROWS, None, {"precompute_ref_batch_size": 4}, "in the batches of training"),
    ],
)
def test_what_is_refused(tmp_path, train, evaluation, options, message):
    options = {"train_dataset": train, "eval_dataset": evaluation} | options
    with pytest.raises(InputError, match=message):
        make_trainer(tmp_path, evaluate=False, **options)


def test_from_the_command_line(tmp_path, monkeypatch, capfd):
    """`dpo precompute`, then `dpo train`, which scores no reference any more."""
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps(row) + "\n" for row in SHORT)
    (tmp_path / "pairs.jsonl").write_text(rows)
    source = "{informs: [{data_files: pairs.jsonl}]}"
    (tmp_path / "run.yaml").write_text(
        f"config:\n  model: {{name_or_path: {FIXTURE / 'model'}, dtype: float32}}\n"
        "  reference_model:\n"
        f"    {{name_or_path: {FIXTURE / 'model'}, dtype: bfloat16}}\n"
        f"  mixture: {source}\n  eval_mixture: {source}\n"
        "  sharding: {fsdp: 1, data: 8}\n"
        "  trainer: {total_batch_size: 8, max_training_steps: 1, log_steps: 1}\n"
    )
    assert main(["precompute", "run.yaml"]) == 0
    printed = capfd.readouterr().out
    assert "train_dataset: 11 pairs, chosen -" in printed
    assert "eval_dataset: 11 pairs, chosen -" in printed
    assert not (tmp_path / "dpo_checkpoints").exists()
    monkeypatch.setattr("engine.training.precompute._score", None)
    assert main(["train", "run.yaml", "trainer.precompute_ref_log_probs=true"]) == 0
    line = lines(tmp_path / "dpo_checkpoints")[0]
    # The reference computes in bfloat16, the policy in float32: near, not equal.
    assert 1e-5 < abs(line["rewards/chosen"]) < 2**-8 * abs(line["logps/chosen"])
