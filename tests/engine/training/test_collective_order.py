"""A collective beside a loop that has some, too: found, and put in order."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from engine.parallel.collectives import after
from engine.parallel.sharding import DATA, make_mesh
from tests.engine.training.collective_order import unordered


def two_loops(ordered: bool) -> str:
    mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])

    def loop(x):
        def body(x, _):
            return jnp.tanh(lax.all_gather(x, DATA, axis=0, tiled=True)[: len(x)]), None

        return lax.scan(body, x, length=3)[0]

    def program(x, y):
        first = loop(x)
        return first, loop(after(y, first, mesh) if ordered else y)

    sharded = jax.shard_map(program, mesh=mesh, in_specs=P(DATA), out_specs=P(DATA))
    x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    text = jax.jit(sharded).lower(x, x).compile().as_text()
    assert text is not None
    return text


def test_two_loops_are_in_order_only_when_told():
    assert len(unordered(two_loops(ordered=False))) == 1
    assert not unordered(two_loops(ordered=True))
