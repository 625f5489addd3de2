"""How the gradients of gathered weights are added up over devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from dpo_kernels.op.devices import known_gpus, pretended
from engine.models.linear import gathered
from engine.parallel.sharding import SPLIT, make_mesh
from tests.engine.tiny_models import gradient_equations, mesh_of


def test_gradients_are_added_up_in_the_dtype_that_was_asked_for():
    """Against float64, of what each device's products gave in bfloat16.

    A sum of eight is rounded seven times at most.
    """
    mesh = make_mesh(1, 8, 1)
    parts = np.random.default_rng(0).standard_normal((8, 16, 64))
    parts = jnp.asarray(parts, jnp.bfloat16)
    truth = np.asarray(parts, np.float64).sum(axis=0)
    sizes = np.abs(np.asarray(parts, np.float64)).sum(axis=0)
    weight = jnp.ones((16, 64), jnp.float32)
    off = {}
    for reduce_dtype in ("float32", "bfloat16"):

        def pull(shard, part, reduce_dtype=reduce_dtype):
            whole: Any
            whole, pullback = jax.vjp(
                lambda x: gathered(x, 1, "bfloat16", reduce_dtype), shard
            )
            assert whole.dtype == jnp.bfloat16 and whole.shape == (16, 64)
            return pullback(part[0])[0]

        specs = P(None, SPLIT), P(SPLIT)
        run = jax.shard_map(pull, mesh=mesh, in_specs=specs, out_specs=specs[0])
        got = jax.jit(run)(weight, parts)
        assert got.dtype == jnp.float32
        off[reduce_dtype] = np.abs(np.asarray(got, np.float64) - truth) / sizes
    assert off["float32"].max() <= 7 * 2.0**-24
    assert 2.0**-12 < off["bfloat16"].max() <= 7 * 2.0**-9


@pytest.mark.parametrize("axis", [0, 1])
def test_a_gpu_gathers_the_same_along_the_first_axis(axis):
    """Eight devices' shards, of two axes of the mesh, and their gradients."""
    shape = (32, 48)
    # Whole numbers, of which sums are exact.
    rng = np.random.default_rng(1)
    x, dout = rng.integers(-99, 99, (2, *shape)).astype(np.float32)
    spec = P(None, SPLIT) if axis else P(SPLIT)

    def pull(shard, dout):
        whole: Any
        dout = lax.pcast(dout, SPLIT, to="varying")
        whole, pullback = jax.vjp(
            lambda x: gathered(x, axis, "float32", "float32"), shard
        )
        return whole[None], pullback(dout)[0]

    run = jax.shard_map(
        pull,
        mesh=mesh_of((1, 4, 1, 2)),
        in_specs=(spec, P()),
        out_specs=(P(SPLIT), spec),
    )
    with pretended(known_gpus()["h200"]):
        whole, dshard = jax.jit(run)(x, dout)
    np.testing.assert_array_equal(whole, np.broadcast_to(x, (8, *shape)))
    np.testing.assert_array_equal(dshard, 8 * dout)


def reductions(**options):
    """The dtypes in which a model's gradients of matrices are reduce-scattered."""
    equations = gradient_equations(**options)
    sums = (x.outvars[0] for x in equations if x.primitive.name == "reduce_scatter")
    return {x.aval.dtype.name for x in sums if x.aval.ndim == 2}


def test_a_models_gradients_are_added_up_in_its_reduce_dtype():
    assert reductions() == {"bfloat16"}
    assert reductions(reduce_dtype="float32") == {"float32"}
    assert reductions(dtype="float32", reduce_dtype="bfloat16") == {"bfloat16"}
