"""Logits that are all large, or some of them very small: checks for every backend."""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_kernels import token_logprobs
from tests.kernels.inputs import arrays, logits_of


def check_two_equal_logits_of_1e8(implementation: str, dtype: str, D: int = 128):
    """Each has probability 1/2, though a float32 near 1e8 is a multiple of 8.

    Beside six logits of 0; hidden and head are 0 but for one product, which is exact.
    """
    size = jnp.asarray(1e4, dtype)
    hidden = jnp.zeros((2, D), dtype).at[:, 0].set(size)
    head = jnp.zeros((8, D), dtype).at[:2, 0].set(size)

    def loss(hidden, head):
        out = token_logprobs(
            *(hidden, head, jnp.asarray([0, 1], jnp.int32)),
            stats=("entropy",),
            implementation=implementation,
        )
        return (out.logprob * jnp.asarray([1.0, 3.0])).sum(), out

    value_and_grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, out), (dhidden, dhead) = jax.block_until_ready(value_and_grad(hidden, head))
    np.testing.assert_allclose(out.logprob, [-np.log(2)] * 2, rtol=1e-6)
    np.testing.assert_allclose(out.entropy, [np.log(2)] * 2, rtol=1e-6)
    np.testing.assert_allclose(out.lse, [float(size) ** 2] * 2, rtol=1e-7)
    # Logits' gradients of [1/2, -1/2] and 3 * [-1/2, 1/2], times hidden or head.
    want = np.zeros((8, D))
    want[:2, 0] = -float(size), float(size)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(dhead, np.float64), want, rtol=eps)
    np.testing.assert_allclose(
        np.asarray(dhidden, np.float64), 0, atol=4 * eps * float(size)
    )


def check_entries_masked_by_a_finite_bias(implementation: str, dtype: str):
    """float32's lowest number, as others mask with: whole blocks, and entries."""
    T, D, V = 8, 128, 640
    hidden, head, _ = arrays(T, D, V, dtype)
    gone = (np.arange(V) < 300) | (np.arange(V) % 3 == 0)
    targets = np.flatnonzero(~gone)[:T].astype(np.int32)
    bias = np.where(gone, np.finfo(np.float32).min, 0).astype(np.float32)
    out = jax.jit(
        lambda hidden, head: token_logprobs(
            *(hidden, head, jnp.asarray(targets)),
            bias=jnp.asarray(bias),
            stats=("entropy", "collision"),
            implementation=implementation,
        )
    )(hidden, head)
    out = jax.block_until_ready(out)
    z = logits_of(hidden, head)[:, ~gone]
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    np.testing.assert_allclose(out.logprob, np.diag(log_p), rtol=0, atol=4e-6)
    np.testing.assert_allclose(out.entropy, -(p * log_p).sum(axis=1), rtol=4e-6)
    np.testing.assert_allclose(out.collision, (p**2).sum(axis=1), rtol=1e-5)
