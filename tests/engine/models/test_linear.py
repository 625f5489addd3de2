"""How the gradients of gathered weights are added up over devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from engine.models.linear import gathered
from engine.parallel.sharding import SPLIT, make_mesh
from tests.engine.tiny_models import gradient_equations


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


def reductions(**options):
    """The dtypes in which a model's gradients of matrices are reduce-scattered."""
    equations = gradient_equations(**options)
    sums = (x.outvars[0] for x in equations if x.primitive.name == "reduce_scatter")
    return {x.aval.dtype.name for x in sums if x.aval.ndim == 2}


def test_a_models_gradients_are_added_up_in_its_reduce_dtype():
    assert reductions() == {"bfloat16"}
    assert reductions(reduce_dtype="float32") == {"float32"}
    assert reductions(dtype="float32", reduce_dtype="bfloat16") == {"bfloat16"}
