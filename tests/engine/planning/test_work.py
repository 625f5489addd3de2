"""FLOPs of a tiny Llama's step, by hand.

P: weights of a layer's projections, of which the backward pass needs no second run of
`down`; R sequences of S tokens; attention's two products are 2 R S S N H each.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from engine.config.lora import LoraConfig
from engine.config.run import ShardingConfig
from engine.models.attention import cudnn
from engine.planning import work
from engine.planning.work import Work, work_of
from tests.engine.planning.runs import MODEL, absent_devices, tiny_run, tiny_step

L, D, F = 3, 64, 96
Q, KV = 64, 32
P = 2 * Q * D + 2 * KV * D + 3 * F * D
R, S, T, V = 8, 64, 256, 512
TOKENS = R * S
PROJECTIONS = 2 * L * P * TOKENS
RECOMPUTED = 2 * L * (P - F * D) * TOKENS
ATTENTION = 4 * L * R * S * S * Q
HEAD = 2 * T * D * V


def flops(run, target="cpu:1"):
    return work_of(tiny_step(run, target)).flops


def test_the_constants_are_the_model_s():
    assert (L, D, F) == tuple(
        MODEL[x] for x in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )


def test_of_full_training(tmp_path):
    assert flops(tiny_run(tmp_path)) == {
        ("projections", "reference"): PROJECTIONS,
        ("projections", "forward"): PROJECTIONS,
        ("projections", "recomputed"): RECOMPUTED,
        ("projections", "backward"): 2 * PROJECTIONS,
        ("attention", "reference"): ATTENTION,
        ("attention", "forward"): ATTENTION,
        ("attention", "recomputed"): ATTENTION,
        # Scores once more, and four gradients.
        ("attention", "backward"): 5 * ATTENTION // 2,
        ("head", "reference"): HEAD,
        ("head", "forward"): HEAD,
        ("head", "recomputed"): HEAD,
        ("head", "backward"): 2 * HEAD,
    }


def test_what_is_kept_is_not_recomputed(tmp_path):
    found = flops(tiny_run(tmp_path, remat="none"))
    assert ("projections", "recomputed") not in found
    assert ("attention", "recomputed") not in found
    assert found["projections", "backward"] == 2 * PROJECTIONS


@pytest.mark.parametrize(
    ("changes", "target", "parts"),
    [({"gradient_accumulation_steps": 2}, "cpu:1", 1), ({}, "cpu:2", 2)],
)
def test_microbatches_and_shards_share_the_work(tmp_path, changes, target, parts):
    found = flops(tiny_run(tmp_path, **changes), target)
    assert parts * found["projections", "backward"] == 2 * PROJECTIONS
    assert parts * found["attention", "forward"] == ATTENTION
    assert parts * found["head", "recomputed"] == HEAD


def test_without_a_reference_nothing_is_computed_for_it(tmp_path):
    found = flops(tiny_run(tmp_path, precompute_ref_log_probs=True))
    assert not [key for key in found if key[1] == "reference"]
    assert found["projections", "forward"] == PROJECTIONS


def test_a_frozen_base_has_no_gradient(tmp_path):
    """With rank r beside every linear module: 2 r (in + out) of each more a pass."""
    found = flops(tiny_run(tmp_path, lora=LoraConfig(r=4, target_modules="all-linear")))
    ins_and_outs = 2 * (Q + D) + 2 * (KV + D) + 3 * (F + D)
    adapter = 2 * L * 4 * ins_and_outs * TOKENS
    assert found["projections", "reference"] == PROJECTIONS
    assert found["projections", "forward"] == PROJECTIONS + adapter
    # To its input alone, and to both of the adapter's factors.
    assert found["projections", "backward"] == PROJECTIONS + 2 * adapter
    assert found["head", "backward"] == HEAD


def test_losses_of_the_whole_batch_run_the_models_twice(tmp_path):
    """Of several microbatches; see `training.gradients`. Rows are twice as long."""
    run = tiny_run(
        tmp_path, loss_type="aot", gradient_accumulation_steps=2, max_length=2 * S
    )
    found = flops(run)
    assert found["projections", "forward"] == 4 * PROJECTIONS
    assert found["attention", "reference"] == 2 * 4 * ATTENTION
    assert found["head", "recomputed"] == 2 * HEAD


def test_attention_goes_over_the_tiles_that_causality_leaves(tmp_path):
    """Of 384 tokens, three tiles: 6 of 9."""
    found = flops(tiny_run(tmp_path, max_length=384))
    assert found["attention", "forward"] == 4 * L * R * 384 * 384 * Q * 6 // 9


def test_rows_over_two_devices_are_half_the_work_of_each(tmp_path):
    """Four pieces of 16 tokens, a tile each: 1 + 4 and 2 + 3 of 16."""
    run = tiny_run(tmp_path, sharding=ShardingConfig(fsdp=1, sequence=2))
    found = flops(run, "cpu:2")
    assert 2 * found["projections", "backward"] == 2 * PROJECTIONS
    assert 2 * found["attention", "forward"] == ATTENTION * 10 // 16
    assert 2 * found["head", "recomputed"] == HEAD


def test_attention_of_a_tpu_is_counted_in_its_kernels(tmp_path, monkeypatch):
    """Blocks of 1,024 of 2,048 tokens: 3 of 4."""
    absent_devices("v6e:1x1", monkeypatch)
    work = work_of(tiny_step(tiny_run(tmp_path, max_length=2048), "v6e:1x1"))
    attention = 4 * L * R * 2048 * 2048 * Q * 3 // 4
    assert not work.uncounted
    assert work.flops["attention", "forward"] == attention
    # Keys and values, then queries: scores twice more, and five gradients; and what
    # these are measured from, a sum over the results.
    backward = 7 * attention // 2 + 2 * L * R * 2048 * Q
    assert work.flops["attention", "backward"] == backward


@pytest.mark.parametrize(
    ("operands", "results", "products"),
    [("qkk", "q", 2), ("qkks", "qss", 2), ("qkkqsss", "q", 3), ("qkkqsss", "kk", 4)],
)
def test_tokamaxs_kernels_are_told_apart(operands, results, products):
    """By what they are given and what they return; queries see 1 + ... + 16 keys."""
    shapes = {"q": (3, 16, 4, 8), "k": (3, 16, 2, 8), "s": (3, 4, 16)}

    def variables(letters):
        avals = [jax.ShapeDtypeStruct(shapes[x], jnp.float32) for x in letters]
        return [SimpleNamespace(aval=x) for x in avals]

    equation = SimpleNamespace(invars=variables(operands), outvars=variables(results))
    counted = Work()
    work._count_fused(equation, 5, "", counted)
    assert counted.total == 5 * products * 2 * (3 * 4 * 8) * 16 * 17 // 2


def test_calls_of_cudnn_are_counted(monkeypatch):
    """Two products forward and five for the gradients; queries see 1 + ... + 16."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)
    query, key = (jax.ShapeDtypeStruct((3, 16, n, 8), jnp.bfloat16) for n in (4, 2))

    def total(query, key, value):
        out = cudnn.attend(query, key, value, scale=1.0)
        return out.astype(jnp.float32).sum()

    counted = Work()
    jaxpr = jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(query, key, key)
    work._count(jaxpr.jaxpr, 5, 1, "", counted)
    assert counted.of_part("attention") == 5 * 7 * 2 * (3 * 4 * 8) * 16 * 17 // 2
