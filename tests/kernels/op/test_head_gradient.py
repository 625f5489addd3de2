"""How the gradient of the head is summed."""

import jax
import jax.numpy as jnp
import numpy as np

from dpo_kernels import token_logprobs


def test_the_gradient_of_the_head_is_summed_in_float32():
    """Over 256 blocks of rows, none of which changes a bfloat16 sum of 256."""
    hidden, head = jnp.ones((2048, 8), "bfloat16"), jnp.zeros((16, 8), "bfloat16")
    targets = jnp.zeros(2048, jnp.int32)

    def loss(head):
        out = token_logprobs(hidden, head, targets, workspace_bytes=2**12)
        return out.logprob.sum()

    want = np.where(np.arange(16) == 0, 15 / 16, -1 / 16)[:, None] * np.full(8, 2048)
    np.testing.assert_array_equal(jax.grad(loss)(head).astype(jnp.float32), want)
