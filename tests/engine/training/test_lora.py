"""A step that trains an adapter: on every mesh, with dropout, on a shared base."""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from flax import nnx
from jax.extend.core import jaxprs_in_params

from engine.cli import main
from engine.config.dpo import DPOConfig
from engine.models import Adapter, add_adapter, load_model
from engine.models.adapter import LINEARS
from engine.objective.references import FrozenModel, SharedModel, shares_arrays
from engine.objective.scoring import ScoringOptions
from engine.parallel.batch import put_batch
from engine.training.lora import reference_decoder
from engine.training.metrics import means
from engine.training.optimizer import learning_rate_schedule, make_optimizer
from engine.training.precompute import free, reference_key
from engine.training.prepare import loss_options, step_options
from engine.training.reference import make_reference
from engine.training.step import (
    init_state,
    make_eval_step,
    make_train_step,
    split_model,
)
from tests.engine.tiny_models import one_device
from tests.engine.training.step_runs import (
    BETA,
    Ran,
    assert_same,
    make_pairs,
    model_on,
    plan_of,
    prompted_pairs,
)

FIXTURES = Path(__file__).parents[2] / "fixtures"
ADAPTER = Adapter(rank=3, alpha=6.0, modules=tuple(LINEARS))


def with_numbers(policy, seed=5):
    """B is 0 in a new adapter, behind which A has no gradient."""
    for path, variable in policy.variables().items():
        if path[-1].endswith("_lora_b"):
            x = variable[...]
            rng = np.random.default_rng(seed)
            drawn = 0.1 * rng.standard_normal(x.shape).astype(np.float32)
            variable.set_value(jax.device_put(drawn, x.sharding))
    return policy


def make_policy(sizes, dropout=0.0):
    base = model_on(sizes)
    adapter = dataclasses.replace(ADAPTER, dropout=dropout)
    return base, with_numbers(add_adapter(base, adapter, seed=1))


@functools.cache
def lora_run(
    sizes, dropout=0.0, accumulation=1, optimizer: Any = "adamw", packed=False
):
    """The run, and what its first step was called with and compiled to."""
    steps = 2
    config = DPOConfig(
        optimizer=optimizer,
        total_batch_size=16,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        beta=BETA,
        packing=packed,
        share_prompt=packed,
    )
    base, policy = make_policy(sizes, dropout)
    reference = make_reference(policy, base, config)
    update = make_optimizer(config, policy.config, policy.mesh, steps)
    schedule = learning_rate_schedule(config, steps)
    step: Any = make_train_step(
        policy, reference, update, schedule, step_options(config)
    )
    plan = plan_of(prompted_pairs(16 * steps), config, sizes)
    state, frozen = init_state(policy, update), split_model(policy)[2]
    before = jax.device_get(frozen)
    numbers = jax.tree.map(jnp.float32, loss_options(config))
    lines: list[dict[str, float]] = []
    first: list[Any] = []
    for batch, _ in plan.batches():
        batch = put_batch(batch, policy.mesh)
        arguments = state, frozen, reference.operands, batch, numbers
        if not lines:
            first = [step.trace(*arguments).jaxpr, jax.tree.leaves(arguments)]
        state, out = step(*arguments)
        lines.append(means(out.sums) | {"grad_norm": float(out.grad_norm)})
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), before)
    params = jax.tree.map(np.asarray, jax.device_get(state.params))
    return Ran(lines, 16, params), first


@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 2, 2, 2)], ids=str)
def test_meshes_and_arrangements_agree_with_dropout(sizes):
    """Of muon, which takes the factors of one layer on one device at a time."""
    want, _ = lora_run((1, 1, 1), 0.25, optimizer="muon")
    got, _ = lora_run(sizes, 0.25, accumulation=2, optimizer="muon", packed=True)
    assert_same(got, want)


def test_dropout_is_the_policys_alone_and_new_at_each_step():
    dropped = lora_run((1, 1, 1), 0.25, optimizer="muon")[0]
    plain = lora_run((1, 1, 1))[0]
    first, other = dropped.lines[0], plain.lines[0]
    # Rounding is a thousandth of this.
    assert abs(first["logps/chosen"] - other["logps/chosen"]) > 0.02

    def reference(line):
        return line["logps/chosen"] - line["rewards/chosen"] / BETA

    assert reference(first) == pytest.approx(reference(other), rel=1e-5)
    assert reference(dropped.lines[1]) == pytest.approx(
        reference(plain.lines[1]), rel=1e-5
    )


def test_the_base_is_an_operand_once():
    """Its bytes are among the arguments of the step once, not a second time."""
    base, policy = make_policy((1, 1, 1))
    reference = make_reference(policy, base, DPOConfig())
    assert isinstance(reference, SharedModel) and not reference.operands
    frozen = {id(x) for x in jax.tree.leaves(split_model(policy)[2])}
    assert frozen == {id(x) for x in jax.tree.leaves(nnx.state(base))}
    arrays = lora_run((1, 1, 1))[1][1]
    shapes = [x.shape for x in arrays]
    assert shapes.count(base.embed.shape) == 1
    # The adapter, and two moments of each: nothing else has its shapes.
    assert shapes.count((2, 3, 32)) == 5 * 3


def products(jaxpr):
    """The shapes of all matrix products, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn.outvars[0].aval.shape
        for inner in jaxprs_in_params(eqn.params):
            yield from products(inner)


def test_a_frozen_head_costs_no_gradient():
    head = (201, 32)  # V, D: of no other product's shape
    assert head not in set(products(lora_run((1, 1, 1))[1][0].jaxpr))
    config, model = DPOConfig(total_batch_size=16), model_on((1, 1, 1))
    reference = make_reference(model, None, config)
    optimizer = make_optimizer(config, model.config, model.mesh, 1)
    schedule = learning_rate_schedule(config, 1)
    step: Any = make_train_step(
        model, reference, optimizer, schedule, step_options(config)
    )
    plan = plan_of(make_pairs(16), config, (1, 1, 1))
    batch = put_batch(next(plan.batches())[0], model.mesh)
    numbers = jax.tree.map(jnp.float32, loss_options(config))
    state, frozen = init_state(model, optimizer), split_model(model)[2]
    full = step.trace(state, frozen, reference.operands, batch, numbers).jaxpr
    assert head in set(products(full.jaxpr))


def test_evaluation_drops_nothing():
    dropped = lora_run((1, 1, 1), 0.25, optimizer="muon")[1][0]
    assert "threefry2x32" in str(dropped)
    _, policy = make_policy((1, 1, 1), dropout=0.25)
    config = DPOConfig(total_batch_size=16)
    reference = make_reference(policy, None, config)
    evaluate: Any = make_eval_step(policy, reference, step_options(config))
    plan = plan_of(make_pairs(16), config, (1, 1, 1))
    batch = put_batch(next(plan.batches())[0], policy.mesh)
    _, params, frozen = split_model(policy)
    numbers = jax.tree.map(jnp.float32, loss_options(config))
    traced = evaluate.trace(params, frozen, reference.operands, batch, numbers)
    assert "threefry2x32" not in str(traced.jaxpr)


def test_which_references_share_the_base():
    base, policy = make_policy((1, 1, 1))
    own = make_reference(policy, None, DPOConfig())
    assert isinstance(own, SharedModel)
    trained = split_model(policy)[1]
    assert len(own.operands) == len(jax.tree.leaves(trained)) == 14
    assert not {id(x) for x in own.operands.values()} & {
        id(x) for x in jax.tree.leaves(trained)
    }
    another = make_reference(policy, add_adapter(base, ADAPTER, seed=2), DPOConfig())
    assert isinstance(another, SharedModel) and len(another.operands) == 14
    foreign = make_reference(policy, model_on((1, 1, 1), seed=1), DPOConfig())
    assert isinstance(foreign, FrozenModel)


def test_a_base_is_kept_in_the_compute_dtype():
    base = model_on((1, 1, 1), dtype="bfloat16")
    policy = add_adapter(base, ADAPTER)
    for model in (base, policy):
        assert model.embed.dtype == jnp.bfloat16
    assert policy.embed[...] is base.embed[...]
    dtypes = {x.dtype for x in jax.tree.leaves(split_model(policy)[1])}
    assert dtypes == {jnp.dtype(jnp.float32)}


def test_a_new_adapter_is_pefts():
    """Kaiming's uniform numbers with a = sqrt(5), the same on every mesh; B is 0."""
    one, many = (add_adapter(model_on(s), ADAPTER) for s in ((1, 1, 1), (1, 2, 4)))
    for path, variable in one.variables().items():
        if "_lora_" in path[-1]:
            x = np.asarray(variable[...])
            np.testing.assert_array_equal(x, np.asarray(many.variables()[path][...]))
            if path[-1].endswith("_lora_b"):
                assert not x.any()
            else:
                bound = 1 / math.sqrt(x.shape[-1])
                assert 0.9 * bound < np.abs(x).max() <= bound
                assert x.std() == pytest.approx(bound / math.sqrt(3), rel=0.2)
    with pytest.raises(ValueError, match="has an adapter already"):
        add_adapter(one, ADAPTER)


CHAT = FIXTURES / "trl" / "chat"
TRAINED = FIXTURES / "trl_lora" / "trained" / "trained"


def test_a_named_reference_shares_the_base_where_it_is_the_same_model():
    base = load_model(CHAT / "model", mesh=one_device(), dtype="float32")
    policy = add_adapter(base, ADAPTER)

    def reference(name=None, adapter=None, policy=policy):
        return reference_decoder(policy, base, name=name, adapter=adapter, synced=False)

    assert reference() is None
    assert reference(name=CHAT / "model") is base
    other = reference(name=CHAT / "reference")
    assert other is not None and not shares_arrays(other, policy)
    for name in (None, CHAT / "model"):
        adapted = reference(name, str(TRAINED))
        assert adapted is not None and adapted.config.adapter is not None
        assert adapted.config.adapter.rank == 3 and shares_arrays(adapted, policy)
        shared = make_reference(policy, adapted, DPOConfig())
        assert isinstance(shared, SharedModel) and len(shared.operands) == 14
    # Without an adapter the policy's arrays are used up: the reference has its own.
    own = reference(CHAT / "model", str(TRAINED), policy=base)
    assert own is not None and not shares_arrays(own, base)
    assert own.embed[...] is not base.embed[...]


def test_validate_says_what_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = {"type": "jsonl", "data_files": str(CHAT / "data.jsonl")}
    config = {
        "model": {"name_or_path": str(CHAT / "model")},
        "mixture": {"informs": [source]},
        "sharding": {"data": 8, "fsdp": 1},
        "trainer": {"total_batch_size": 8},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"config": config}))

    def validate(*overrides):
        code = main(["validate", str(path), *overrides])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    code, out = validate()
    assert code == 0
    total = re.search(r"trained     all ([0-9,]+)$", out, re.MULTILINE)
    assert total is not None and f"llama, {total[1]} parameters" in out
    code, out = validate("lora={r: 2, lora_alpha: 6}")
    # Two layers; q is [32, 32] and v is [16, 32].
    assert code == 0 and "trained     448 (" in out
    assert "LoRA of rank 2, scale 3, in q_proj, v_proj" in out
    assert "reference   the model without its adapter" in out
    assert f"llama, {total[1]} parameters" in out
    code, out = validate(f"lora.adapter={TRAINED}")
    assert code == 0 and "LoRA of rank 3, scale 3.464, in q_proj, k_proj," in out
    assert f"reference   the model with a frozen copy of {TRAINED}" in out
    code, out = validate("lora={}", f"reference_model.adapter={TRAINED}")
    assert code == 0
    assert f"reference   {CHAT / 'model'} with the adapter {TRAINED}" in out
    code, out = validate(f"model.name_or_path={TRAINED}")
    assert code == 2 and "give that model, and this directory as lora.adapter" in out
    code, out = validate(f"lora.adapter={TRAINED}", f"trainer.save_directory={TRAINED}")
    assert code == 2 and f"is the directory of lora.adapter='{TRAINED}'" in out
    code, out = validate(f"lora.adapter={CHAT / 'model'}")
    assert code == 2 and "adapter_config.json: missing" in out


def test_precomputed_values_leave_the_shared_base_alone():
    """The base is scored in place; the policy, which is made of it, goes on."""
    base = model_on((1, 1, 1))
    policy = add_adapter(base, ADAPTER, seed=1)
    assert shares_arrays(base, policy)
    free(base, policy)
    assert not any(x.is_deleted() for x in jax.tree.leaves(nnx.state(policy)))
    # What an adapter does in training alone, and its base's name, change no value.
    key = reference_key(policy, ScoringOptions())
    other = dataclasses.replace(ADAPTER, dropout=0.5, base="elsewhere")
    same = add_adapter(base, other, seed=1)
    assert reference_key(same, ScoringOptions()) == key
    assert reference_key(base, ScoringOptions()) != key
    assert reference_key(with_numbers(same), ScoringOptions()) != key
