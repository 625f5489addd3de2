"""Training runs: their lines, compilations, memory, and how they end."""

import importlib.machinery
import sys
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engine import DPOTrainer, InputError, load_model
from engine.training.events import Listener
from tests.engine.training.runs import (
    FIXTURE,
    ONE_SHAPE,
    ROWS,
    SHORT,
    compilations,
    make_trainer,
    one_device,
)
from tests.json_lines import read_lines


class Heard(Listener):
    """Keeps everything that it is told."""

    def __init__(self):
        self.steps, self.records, self.ends = [], [], []

    def stepped(self, step):
        self.steps.append(step)

    def recorded(self, record):
        self.records.append(record)

    def ended(self, error):
        self.ends.append(error)


class Run(NamedTuple):
    """One training run, which several tests look at."""

    trainer: DPOTrainer
    lines: list[dict]
    heard: Heard
    wandb: list
    before: np.ndarray
    compilations: list[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six steps, with evaluations, a named set, wandb, and every compilation noted."""
    directory = tmp_path_factory.mktemp("trained")
    seen: list = []
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    run = types.SimpleNamespace(id="abc")
    run.log = lambda line, step: seen.append((step, *sorted(line)[:1]))
    run.finish = lambda exit_code: seen.append(("finished", exit_code))
    vars(wandb)["init"] = lambda **kwargs: run
    heard = Heard()
    with pytest.MonkeyPatch.context() as patch, compilations() as programs:
        patch.setitem(sys.modules, "wandb", wandb)
        trainer = make_trainer(
            directory,
            listeners=(heard,),
            train_dataset=[*ONE_SHAPE[1:], ROWS[8]],  # which is long: two shapes
            eval_dataset={"held_out": SHORT[:6], "again": SHORT[:6]},
            use_wandb=True,
            log_steps=2,
            eval_steps=3,
            num_train_epochs=1,
        )
        before = np.asarray(trainer.model.embed[...])
        first = trainer.evaluate()
        assert first["eval_held_out_rewards/margins"] == pytest.approx(0, abs=1e-5)
        trainer.train()
    lines = read_lines(directory / "metrics.jsonl")
    return Run(trainer, lines, heard, seen, before, programs)


def test_lines_of_metrics_and_evaluations(trained):
    found = [(line["step"], "eval_held_out_loss" in line) for line in trained.lines]
    # A line every two steps and the rest at the end; an evaluation every three steps
    # and at the end, of each of two sets. 21 pairs make six steps.
    kinds = [kind for _, kind in found]
    assert [step for step, _ in found] == [2, 3, 3, 4, 6, 6, 6]
    assert kinds == [False, True, False, False, False, True, False]
    perf = {"perf/step_seconds", "perf/tokens_per_second", "perf/scored_fraction"}
    assert perf <= trained.lines[0].keys()
    assert 0 < trained.lines[0]["perf/scored_fraction"] < 1
    last = trained.lines[-3:]
    assert last[0]["num_tokens"] == last[1]["eval_held_out_num_tokens"] > 0
    same = last[1]["eval_held_out_loss"], last[2]["eval_again_loss"]
    assert same[0] == same[1]


def test_listeners_and_wandb_hear_everything(trained):
    assert [step.number for step in trained.heard.steps] == [1, 2, 3, 4, 5, 6]
    assert [dict(x.metrics) for x in trained.heard.records] == trained.lines
    assert trained.heard.ends == [None]
    assert [x[0] for x in trained.wandb[:-1]] == [x["step"] for x in trained.lines]
    assert trained.wandb[-1] == ("finished", 0)


def test_everything_is_compiled_before_the_first_step(trained):
    """One program a step and shape: none again at the second step, after evaluation."""
    steps = [name for name in trained.compilations if name in ("step", "evaluate")]
    run = trained.trainer.run
    shapes = len({shape for plan in run.eval_plans.values() for shape in plan.shapes})
    assert steps.count("step") == len(run.plan.shapes) == 2
    assert steps.count("evaluate") == shapes


def test_the_model_holds_the_trained_parameters(trained):
    trainer = trained.trainer
    assert (np.asarray(trainer.model.embed[...]) != trained.before).any()
    evaluated = trainer.evaluate()["eval_held_out_rewards/margins"]
    assert evaluated == trained.lines[-2]["eval_held_out_rewards/margins"] != 0


def test_a_trainer_trains_once(trained):
    with pytest.raises(InputError, match="all 6 steps of this trainer are done"):
        trained.trainer.train()


def test_nothing_is_compiled_between_the_first_step_and_the_last(tmp_path):
    """With evaluations, a reference that follows, and axes of length 1 in the mesh."""

    class Clock(Listener):
        def started(self, total_steps, done):
            programs.clear()

        def recorded(self, record):
            programs.append("recorded")

    with compilations() as programs:
        make_trainer(
            tmp_path,
            sizes=(1, 2, 1),
            listeners=(Clock(),),
            sync_ref_model=True,
            ref_model_sync_steps=1,
            eval_steps=1,
            max_training_steps=3,
        ).train()
    # Two lines, three evaluations; saving, which comes last, is no part of the loop.
    assert programs[:5] == ["recorded"] * 5


def test_no_copy_of_the_policy_outlives_the_first_step(tmp_path):
    """Nor of a named reference: its arrays become the trainer's, cast in place."""
    # Stored in float32, it computes in bfloat16.
    reference = load_model(FIXTURE / "model", mesh=one_device())
    trainer = make_trainer(
        tmp_path,
        evaluate=False,
        max_training_steps=1,
        reference_model=reference,
        dtype="bfloat16",
    )
    policy = jax.tree.leaves(trainer.state.params)
    operands = jax.tree.leaves(trainer._reference.operands)
    held = jax.tree.leaves(nnx.state(reference))
    assert all(a is b for a, b in zip(held, operands, strict=True))
    assert {x.dtype.name for x in held} == {"bfloat16"}
    given = jax.tree.leaves(nnx.state(trainer._model_given))
    assert all(a is b for a, b in zip(given, policy, strict=True))
    trainer.train()
    assert all(x.is_deleted() for x in policy)
    assert not any(x.is_deleted() for x in operands)
    # The caller's model holds the trained parameters, which are the state's own.
    given = jax.tree.leaves(nnx.state(trainer._model_given))
    state = jax.tree.leaves(trainer.state.params)
    assert all(a is b for a, b in zip(given, state, strict=True))


def test_a_model_is_trained_by_one_trainer_at_a_time(tmp_path):
    """The other is told, and does not start from what the first has made of it."""
    model = load_model(FIXTURE / "model", mesh=one_device(), dtype="float32")
    options = {"evaluate": False, "model": model, "max_training_steps": 1}
    first, second = (make_trainer(tmp_path / name, **options) for name in "ab")
    first.train()
    with pytest.raises(InputError, match="used up by another trainer; load the model"):
        second.train()
    # A trained model may be trained further, measured from itself.
    third = make_trainer(tmp_path / "c", reference_model=first.model, **options)
    third.train()
    line = read_lines(tmp_path / "c" / "metrics.jsonl")[0]
    assert line["loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    """The steps, the schedule, the tokens and the metrics file of an unbroken one."""

    class Interrupt(Listener):
        def stepped(self, step):
            if step.number == 2 and not ended:
                raise KeyboardInterrupt

        def ended(self, error):
            ended.append(type(error))

    ended: list[type] = []
    options = {"evaluate": False, "max_training_steps": 4, "log_steps": 1}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    broken = make_trainer(tmp_path / "broken", listeners=(Interrupt(),), **options)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert broken.progress.step == int(broken.state.step) == 3
    broken.train()
    assert ended == [KeyboardInterrupt, type(None)]
    lines = [
        read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "broken")
    ]
    assert lines[1][-1]["step"] == 4
    for name in ("loss", "learning_rate", "num_tokens"):
        assert lines[0][-1][name] == lines[1][-1][name]
    states = (jax.tree.leaves(jax.device_get(x.state)) for x in (whole, broken))
    assert all((a == b).all() for a, b in zip(*states, strict=True))
    # The end of the steps is the schedule's, too.
    rates = [line["learning_rate"] for line in lines[0]]
    np.testing.assert_allclose(rates, [1e-3, 0.75e-3, 0.5e-3, 0.25e-3], rtol=1e-6)


def test_everyone_hears_the_end_and_the_model_is_saved_before(tmp_path):
    class Failing(Listener):
        def ended(self, error):
            assert (tmp_path / "model.safetensors").exists()
            raise OSError("the disk of the listener is full")

    heard = Heard()
    trainer = make_trainer(
        tmp_path, evaluate=False, max_training_steps=1, listeners=(Failing(), heard)
    )
    with pytest.raises(OSError, match="of the listener"):
        trainer.train()
    assert heard.ends == [None]


def test_a_run_can_be_repeated_to_the_bit(tmp_path):
    """Shuffled by the seed; another seed gives another order."""
    one, two, other = (
        make_trainer(tmp_path / x, evaluate=False, seed=seed, max_training_steps=3)
        for x, seed in (("one", 1), ("two", 1), ("other", 2))
    )
    for trainer in (one, two):
        trainer.train()
    models = (jax.tree.leaves(jax.device_get(x.state.params)) for x in (one, two))
    assert all((a == b).all() for a, b in zip(*models, strict=True))
    orders = [vars(x.plan)["order"].epoch(0).tolist() for x in (one, two, other)]
    assert orders[0] == orders[1] != orders[2]


def test_a_synced_reference_follows(tmp_path):
    """A copy of the policy after every step: the next step starts at margin 0."""
    with compilations() as programs:
        trainer = make_trainer(
            tmp_path,
            evaluate=False,
            sync_ref_model=True,
            ref_model_sync_steps=1,
            ref_model_mixup_alpha=1.0,
            max_training_steps=3,
            log_steps=1,
        )
        trainer.train()
    lines = read_lines(tmp_path / "metrics.jsonl")
    bound = 0.1 * 4 * np.finfo(np.float32).eps * abs(lines[0]["logps/chosen"])
    assert max(abs(line["rewards/margins"]) for line in lines) <= bound
    assert len({line["logps/chosen"] for line in lines}) == 3
    assert programs.count("step") == len(trainer.plan.shapes)
    assert programs.count("mix_parameters") == 1


# One step makes weights that are huge, but finite, and no longer a model.
HUGE: dict[str, Any] = {"learning_rate": 1e15, "max_training_steps": 3}


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_metrics(tmp_path):
    trainer = make_trainer(tmp_path, evaluate=False, log_steps=1, **HUGE)
    with pytest.raises(InputError, match="step [23]: the loss is .*; lower"):
        trainer.train()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(np.log(2)) and lines[-1]["loss"] is None
    assert not (tmp_path / "model.safetensors").exists()
    for again in (trainer.train, lambda: trainer.save_model(tmp_path)):
        with pytest.raises(InputError, match="step [23]: the loss is"):
            again()


def test_weights_that_are_no_numbers_are_blamed(tmp_path):
    model = load_model(FIXTURE / "model", mesh=one_device(), dtype="float32")
    nnx.update(model, jax.tree.map(lambda x: x * jnp.nan, nnx.state(model)))
    with pytest.raises(InputError, match="step 1: .* before any update.*: weights of"):
        options: dict[str, Any] = {"evaluate": False, "max_training_steps": 1}
        make_trainer(tmp_path, model=model, **options).train()


def test_the_last_update_is_looked_at_too(tmp_path):
    """The step's own loss is of the parameters before it, and was fine."""
    trainer = make_trainer(
        tmp_path, evaluate=False, learning_rate=1e30, max_training_steps=1
    )
    with pytest.raises(InputError, match="step 1: this update has made parameters of"):
        trainer.train()
    assert not (tmp_path / "model.safetensors").exists()


def test_an_evaluation_that_is_not_finite_ends_the_run(tmp_path):
    trainer = make_trainer(tmp_path, eval_steps=1, **HUGE)
    with pytest.raises(InputError, match="step 1: eval_loss is nan"):
        trainer.train()
    assert not (tmp_path / "model.safetensors").exists()
