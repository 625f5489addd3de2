"""No axis of a caller's mesh is taken for one of the kernels' own."""

import jax
import jax.numpy as jnp

from dpo_kernels import sequence_sums, token_logprobs
from dpo_kernels.op.devices import known_gpus, pretended

T, D, V, R = 512, 64, 1024, 4


def kernels(jaxpr):
    """The Mosaic kernels of a traced function, by name."""
    found = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "mpmd_map":
            found[equation.params["name"]] = equation.params["meshes"]
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= kernels(inner)
    return found


def test_kernels_axes_have_names_of_their_own():
    """A mesh may have an axis `sequence`, and Mosaic would look there first."""

    def op(hidden, head, targets, offsets):
        def loss(hidden, head):
            out = token_logprobs(
                hidden,
                head,
                targets,
                workspace_bytes=2**18,  # too little to keep what the backward needs
                implementation="mosaic_gpu",
            )
            sums, _ = sequence_sums(
                out.logprob, offsets=offsets, implementation="mosaic_gpu"
            )
            return sums.sum()

        return jax.grad(loss, (0, 1))(hidden, head)

    with pretended(known_gpus()["h200"]):
        traced = jax.make_jaxpr(op)(
            jax.ShapeDtypeStruct((T, D), jnp.bfloat16),
            jax.ShapeDtypeStruct((V, D), jnp.bfloat16),
            jax.ShapeDtypeStruct((T,), jnp.int32),
            jax.ShapeDtypeStruct((R + 1,), jnp.int32),
        )
    found = kernels(traced.jaxpr)
    assert {
        *("token_logprobs_forward", "token_logprobs_dlogits"),
        *("sequence_sums", "sequence_sums_gradient"),
    } <= set(found)
    for meshes in found.values():
        for mesh in meshes:
            for axis in mesh.shape:
                assert axis.startswith("dpo_kernels."), axis
