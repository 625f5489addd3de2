import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from engine.models import decoder
from engine.models.remat import REMAT
from engine.parallel.sharding import (
    AXES,
    BATCH,
    SPLIT,
    TOKENS,
    VOCAB,
    make_mesh,
    param_specs,
)
from tests.engine.tiny_models import (
    gradient_equations,
    random_tokens,
    relative,
    tiny_config,
    tiny_model,
    vocab_rows,
)


def loss_and_grads(model, tokens, early_sum):
    """A scalar of all hidden states and logits, and the gradients of all weights.

    early_sum: parameters stay invariant, and autodiff sums gradients where they are
    used; otherwise they are made varying first, and summed once at the end.
    """
    graphdef, state = nnx.split(model, nnx.Param)
    specs = param_specs(model.config, model.mesh)
    vocab = model.config.vocab_size

    def missing(leaf):
        return tuple(
            axis
            for axis in TOKENS
            if axis not in jax.typeof(leaf).manual_axis_type.varying
        )

    def vary(leaf):
        return lax.pcast(leaf, missing(leaf), to="varying") if missing(leaf) else leaf

    def loss(state, tokens):
        local = nnx.merge(graphdef, state)
        hidden = local(tokens).astype(jnp.float32)
        head = local.head_weight().astype(jnp.float32)
        rows = lax.all_gather(hidden, SPLIT, axis=0, tiled=True)
        logits = jnp.einsum("RSD,VD->RSV", rows, head)
        shard = lax.axis_index(VOCAB)
        ids = shard * head.shape[0] + jnp.arange(head.shape[0])
        slope = (1 + ids % 7).astype(jnp.float32)
        scored = jnp.sin(logits * slope[None, None, :])
        scored = jnp.where((ids < vocab)[None, None, :], scored, 0.0)
        return lax.psum(scored.sum(), AXES)

    def shard(state, tokens):
        axes = [missing(leaf) for leaf in jax.tree.leaves(state)]
        if not early_sum:
            state = jax.tree.map(vary, state)
        value, grads = jax.value_and_grad(loss)(state, tokens)
        if not early_sum:
            leaves, tree = jax.tree.flatten(grads)
            leaves = [lax.psum(x, a) for x, a in zip(leaves, axes, strict=True)]
            grads = jax.tree.unflatten(tree, leaves)
        return value, grads

    run = jax.shard_map(
        shard, mesh=model.mesh, in_specs=(specs, P(BATCH)), out_specs=(P(), specs)
    )
    value, grads = jax.jit(run)(state, tokens)
    return float(value), jax.tree.map(np.asarray, nnx.to_pure_dict(grads))


@functools.cache
def gradients(model_type, mesh_shape, early_sum, remat="full"):
    mesh = make_mesh(*mesh_shape, devices=jax.devices()[: math.prod(mesh_shape)])
    model = tiny_model(tiny_config(model_type), mesh, remat=remat)
    value, grads = loss_and_grads(model, random_tokens(8, 16), early_sum)
    return value, vocab_rows(grads, 101)


def assert_same_gradients(got, want):
    assert got[0] == pytest.approx(want[0], rel=1e-4)
    assert jax.tree.structure(got[1]) == jax.tree.structure(want[1])
    pairs = zip(
        jax.tree.leaves_with_path(got[1]), jax.tree.leaves(want[1]), strict=True
    )
    for (path, a), b in pairs:
        # float32 sums in another order, through sines of steep logits: about 1e-5.
        assert relative(a, b) < 1e-4, path


@pytest.mark.parametrize(
    ("model_type", "mesh_shape", "early_sum"),
    [
        ("gemma2", (8, 1, 1), False),
        ("gemma2", (1, 8, 1), False),
        ("gemma2", (2, 2, 2), False),
        ("gemma2", (1, 2, 4), False),
        ("llama", (2, 2, 2), True),
        ("llama", (1, 2, 4), True),
        ("qwen3", (1, 2, 4), False),
    ],
)
def test_every_mesh_gives_the_gradients_of_one_device(
    model_type, mesh_shape, early_sum
):
    want = gradients(model_type, (1, 1, 1), True)
    assert_same_gradients(gradients(model_type, mesh_shape, early_sum), want)


@pytest.mark.parametrize("remat", ["none", "dots", "offload"])
def test_rematerialisation_changes_no_gradient(remat):
    want = gradients("gemma2", (1, 8, 1), False)
    assert_same_gradients(gradients("gemma2", (1, 8, 1), False, remat), want)


def stacked_by_backward(remat):
    """Shape and dtype of all that scans return: residuals are there."""
    scans = (x for x in gradient_equations(remat=remat) if x.primitive.name == "scan")
    return {(v.aval.shape, v.aval.dtype) for eqn in scans for v in eqn.outvars}


def test_gathered_weights_are_never_kept_for_the_backward_pass(monkeypatch):
    # qwen3's `up`, gathered over fsdp: 48 x 32; its own shard is 48 x 4.
    gathered, cast = (((3, 48, d), jnp.dtype(jnp.bfloat16)) for d in (32, 4))
    kept = {remat: stacked_by_backward(remat) for remat in REMAT}
    for outputs in kept.values():
        assert gathered not in outputs and cast not in outputs
    activation = ((3, 1, 16, 48), jnp.dtype(jnp.bfloat16))  # what `up` returns
    assert activation in kept["none"] and activation in kept["dots"]
    assert activation not in kept["full"]
    monkeypatch.setattr(
        decoder, "policy", lambda remat: jax.checkpoint_policies.everything_saveable
    )
    assert gathered in stacked_by_backward("none")
