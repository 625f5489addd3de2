"""The op with its vocabulary cut over devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpo_kernels import token_logprobs
from dpo_kernels.op.interface import STATS
from dpo_kernels.verify.table import CASES, Case, evaluate, make_inputs, relative_error

SMALL_WORKSPACE = 2**19  # several chunks of the vocabulary, several blocks of rows


def small(*args, **kwargs):
    return token_logprobs(*args, workspace_bytes=SMALL_WORKSPACE, **kwargs)


def vocab_parallel(op, mesh, axis_name, inputs):
    """`op` with the head and the bias cut over the mesh, the rows over `data`."""

    def whole(hidden, head, targets, bias=None, **options):
        def local(hidden, head, bias, targets):
            return op(hidden, head, targets, bias=bias, axis_name=axis_name, **options)

        specs = (P("data"), P(axis_name), None if bias is None else P(axis_name))
        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=(*specs, P("data")), out_specs=P("data")
        )
        return sharded(hidden, head, bias, targets)

    return evaluate(whole, inputs, str(inputs.arrays["hidden"].dtype))


@pytest.mark.parametrize(
    "sizes, axis_name",
    [
        pytest.param((1, 4, 1), "fsdp", marks=pytest.mark.numerics),
        ((2, 2, 2), ("fsdp", "tensor")),
    ],
)
@pytest.mark.parametrize("case", (CASES[2], CASES[3]), ids=lambda case: case.name)
def test_vocab_parallel_equals_one_device(sizes, axis_name, case):
    inputs = make_inputs(96, 32, 1000, case, "float32")
    devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"))
    want = evaluate(small, inputs, "float32")
    assert relative_error(vocab_parallel(small, mesh, axis_name, inputs), want) < 2e-6


def test_vocab_parallel_without_types():
    """Under check_vma=False, with gradients taken inside, as such code has to."""
    inputs = make_inputs(24, 16, 100, CASES[1], "float32")
    _, want_grads = evaluate(small, inputs, "float32")
    cotangents = jnp.asarray(inputs.cotangents, jnp.float32)
    targets = jnp.asarray(inputs.targets)

    def local(hidden, head):
        def loss(hidden, head):
            out = token_logprobs(hidden, head, targets, axis_name="vocab")
            return (cotangents[0] * out.logprob + cotangents[1] * out.lse).sum()

        return jax.grad(loss, (0, 1))(hidden, head)

    sharded = jax.shard_map(
        local,
        mesh=Mesh(np.array(jax.devices()[:4]), ("vocab",)),
        in_specs=(P(), P("vocab")),
        out_specs=(P(), P("vocab")),
        check_vma=False,
    )
    args = (jnp.asarray(inputs.arrays[name]) for name in ("hidden", "head"))
    grads = jax.jit(sharded)(*args)
    wanted = want_grads["hidden"], want_grads["head"]
    assert relative_error(grads, wanted) < 2e-6


def test_vocab_parallel_with_a_shard_of_padding():
    """Ten entries over four devices, padded to sixteen: the last shard has none."""
    inputs = make_inputs(12, 8, 10, Case(name="", softcap=1.5, stats=STATS), "float32")
    want, want_grads = evaluate(small, inputs, "float32")
    head = np.concatenate([inputs.arrays["head"], np.zeros((6, 8), np.float32)])
    bias = np.where(np.arange(16) < 10, 0, -np.inf).astype(np.float32)
    padded = dataclasses.replace(
        inputs, arrays=inputs.arrays | {"head": head, "bias": bias}
    )
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 4), ("data", "vocab"))
    got, grads = vocab_parallel(small, mesh, "vocab", padded)
    assert relative_error(got, want) < 1e-6
    assert relative_error(grads["hidden"], want_grads["hidden"]) < 1e-6
    assert relative_error(grads["head"][:10], want_grads["head"]) < 1e-6
    assert not np.asarray(grads["head"][10:]).any()


def test_vocab_parallel_refuses_what_is_split_the_wrong_way():
    mesh = Mesh(np.array(jax.devices()[:2]), ("vocab",))

    def run(hidden_spec, head_spec):
        return jax.shard_map(
            lambda h, w, t: token_logprobs(h, w, t, axis_name="vocab").lse,
            mesh=mesh,
            in_specs=(hidden_spec, head_spec, hidden_spec),
            out_specs=P(),
        )(jnp.ones((4, 8)), jnp.ones((6, 8)), jnp.zeros(4, jnp.int32))

    with pytest.raises(ValueError, match="targets varies over axis_name='vocab'"):
        run(P("vocab"), P("vocab"))
    with pytest.raises(ValueError, match="head does not vary over all"):
        run(P(), P())


def test_gathered_rows_get_their_gradient_by_a_reduce_scatter():
    """Rows cut over the axis that the vocabulary is cut over, as in the train step."""
    inputs = make_inputs(24, 16, 100, Case(name=""), "float32")
    _, want_grads = evaluate(small, inputs, "float32")
    cotangents = jnp.asarray(inputs.cotangents, jnp.float32)
    targets = jnp.asarray(inputs.targets)

    def local(hidden, head):
        hidden = jax.lax.all_gather(hidden, "vocab", tiled=True)
        out = token_logprobs(hidden, head, targets, axis_name="vocab")
        return (cotangents[0] * out.logprob + cotangents[1] * out.lse).sum()

    sharded = jax.shard_map(
        local,
        mesh=Mesh(np.array(jax.devices()[:4]), ("vocab",)),
        in_specs=(P("vocab"), P("vocab")),
        out_specs=P(),
    )
    args = tuple(jnp.asarray(inputs.arrays[name]) for name in ("hidden", "head"))
    compiled = jax.jit(jax.grad(sharded, (0, 1))).lower(*args).compile()
    wanted = want_grads["hidden"], want_grads["head"]
    assert relative_error(compiled(*args), wanted) < 2e-6
    text = compiled.as_text() or ""
    assert "reduce-scatter" in text
    rows_by_hidden = f"f32[{24},{16}]"
    assert not any(
        " all-reduce(" in line and rows_by_hidden in line for line in text.splitlines()
    )
