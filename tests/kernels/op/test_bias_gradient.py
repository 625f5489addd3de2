"""The gradient of a bias that is wider than what it is added to the products of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_kernels import reference, token_logprobs
from dpo_kernels.mosaic_gpu import logprobs as mosaic_gpu

T, D, V = 200, 64, 304


def within_the_stated_bound(implementation: str, dtype: str, **options) -> None:
    """Against float64: eps of the dlogits' absolute values, summed over the rows."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(T, D)), rng.normal(size=(V, D)) / D**0.5
    hidden, head = jnp.asarray(hidden, dtype), jnp.asarray(head, dtype)
    bias = jnp.asarray(rng.normal(size=V), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, size=T), jnp.int32)
    dlogprob = jnp.asarray(rng.normal(size=T))

    def dbias(op, hidden, head, bias, **options):
        def loss(bias):
            out = op(hidden, head, targets, bias=bias, **options)
            return (out.logprob * dlogprob.astype(out.logprob.dtype)).sum()

        return jax.jit(jax.grad(loss))(bias)

    exact = [x.astype(jnp.float64) for x in (hidden, head, bias)]
    truth = dbias(reference.token_logprobs, *exact)
    z = exact[0] @ exact[1].T + exact[2][None]
    onehot = jnp.arange(V, dtype=jnp.int32)[None] == targets[:, None]
    dlogits = dlogprob[:, None] * (onehot.astype(z.dtype) - jax.nn.softmax(z))
    ours = dbias(
        token_logprobs, hidden, head, bias, implementation=implementation, **options
    )
    assert ours.dtype == jnp.float32
    # Kept exponentials are rounded, and dlogits: each time by eps / 2 at most.
    eps = float(jnp.finfo(dtype).eps)
    off = np.abs(np.asarray(ours, np.float64) - np.asarray(truth))
    assert (off <= eps * np.abs(dlogits).sum(axis=0)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("workspace_bytes", [2**17, 2**24])
def test_recomputed_or_from_kept_exponentials(x64, dtype, workspace_bytes):
    within_the_stated_bound("xla", dtype, workspace_bytes=workspace_bytes)


def test_on_hopper(x64):
    with mosaic_gpu.interpreted():
        within_the_stated_bound("mosaic_gpu", "bfloat16", workspace_bytes=2**17)
