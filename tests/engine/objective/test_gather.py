"""Gathering rows, and its gradient without a scatter of rows."""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_kernels.op.blocks import compact_index
from engine.objective.gather import take_distinct_rows


def test_values_and_gradient_are_those_of_indexing():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(20, 3)), jnp.float32)
    index = jnp.asarray([4, 19, 0, 7, 0, 0])
    used = jnp.asarray([True, True, True, True, False, False])
    weight = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)

    def loss(take):
        return lambda x: (take(x) * weight)[: 4 if take is plain else 6].sum()

    def plain(x):
        return x[index]

    def ours(x):
        return take_distinct_rows(x, index, used)

    np.testing.assert_array_equal(ours(x), plain(x))
    want = jax.grad(loss(plain))(x)
    np.testing.assert_array_equal(jax.jit(jax.grad(loss(ours)))(x), want)
    assert np.asarray(want).any(axis=1).sum() == 4


def test_the_index_closes_the_gaps():
    index, total = compact_index(jnp.asarray([2, 0, 4, 1], jnp.int32), 4)
    assert total == 7
    np.testing.assert_array_equal(index[:7], [0, 1, 8, 9, 10, 11, 12])
    np.testing.assert_array_equal(index[7:], 0)


def test_the_index_of_nothing_and_of_everything():
    index, total = compact_index(jnp.asarray([0, 0], jnp.int32), 3)
    assert total == 0 and not index.any()
    index, total = compact_index(jnp.asarray([3, 3], jnp.int32), 3)
    assert total == 6
    np.testing.assert_array_equal(index, np.arange(6))
