"""The truth itself, once, from the formula."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from dpo_kernels import reference
from dpo_kernels.op.interface import STATS
from dpo_kernels.verify.table import Case, make_inputs


def test_the_reference_agrees_with_a_loop_in_numpy():
    case = Case(name="", softcap=2.0, scale=0.7, bias=True, stats=STATS)
    inputs = make_inputs(9, 6, 11, case, "float32")
    out = reference.token_logprobs(
        jnp.asarray(inputs.arrays["hidden"]),
        jnp.asarray(inputs.arrays["head"]),
        jnp.asarray(inputs.targets),
        bias=jnp.asarray(inputs.arrays["bias"]),
        **dataclasses.asdict(inputs.options),
    )
    assert out.entropy is not None and out.collision is not None
    assert out.mean_logit is not None and out.top1 is not None
    for t in range(9):
        z = []
        for v in range(11):
            x = 0.7 * inputs.arrays["hidden"][t] @ inputs.arrays["head"][v]
            x += inputs.arrays["bias"][v]
            z.append(2.0 * np.tanh(x / 2.0) if np.isfinite(x) else -np.inf)
        p = np.exp(z) / np.exp(z).sum()
        finite = np.isfinite(z)
        target = inputs.targets[t]
        np.testing.assert_allclose(out.logprob[t], np.log(p[target]), rtol=1e-5)
        np.testing.assert_allclose(out.lse[t], np.log(np.exp(z).sum()), rtol=1e-5)
        entropy = -(p[finite] * np.log(p[finite])).sum()
        np.testing.assert_allclose(out.entropy[t], entropy, rtol=1e-5)
        np.testing.assert_allclose(out.collision[t], (p**2).sum(), rtol=1e-5)
        mean = np.asarray(z)[finite].mean()
        np.testing.assert_allclose(out.mean_logit[t], mean, rtol=1e-4)
        assert out.top1[t] == (target == np.argmax(z))
