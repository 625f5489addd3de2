"""Accurate exp, expm1 and log, for values of which there is one a row: [T], not [T, V].

XLA's defaults are rough on TPUs. Their greatest errors in float32, in ULP, as JAX
documents them (docs.jax.dev, Numerical accuracy; all inputs were tried):

              v5e    v5p   v6e   7x
    exp       116  109.5  64.5   65     `highest`: 1.5
    expm1    1772   1358   3.5  3.5     `highest`: 2
    log      4030     62   2.5  2.5     (no better one to ask for)

An ULP of lse - max, which is about 10, is 1e-6: over a sequence of 1000 tokens v5e's
logarithm may be wrong by nats. That of `log` here is within 3e-6 of the truth anywhere.

The TPU kernels use the default exponentials, as their instructions show: the relative
error of each is at most 1.4e-5 (v5e) or 7.7e-6 (v6e, 7x). A term of the sum inside lse
is exp(z - max), rescaled by one more exponential each time that its lane's maximum
rises afterwards; lse may be off by as much for each exponential that a term is a
product of. (libtpu 0.0.48 compiles `highest` to the default on 7x: there `exp` is as
good as a kernel's.)
"""

import re

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dpo_kernels.op.devices import traced_device


def exp(x: Array) -> Array:
    """e**x to 2 ULP."""
    return lax.exp(x, accuracy=lax.AccuracyMode.HIGHEST)


def expm1(x: Array) -> Array:
    """e**x - 1 to 2 ULP (6.5 on a CPU), also near 0."""
    return lax.expm1(x, accuracy=lax.AccuracyMode.HIGHEST)


def log(x: Array) -> Array:
    """The natural logarithm, to 2.5 ULP.

    Up to v5p a TPU's is mended by a step of Newton's method: in float32 to 2e-7 and an
    ULP of the result, from one that is off by up to 4096 ULP.
    """
    rough, device = jnp.log(x), traced_device()
    if device.platform != "tpu" or not re.match(r"TPU v[2-5]", device.kind):
        return rough
    off = x * exp(-rough) - 1  # e**(error of `rough`) - 1
    mended = rough + off * (1 - off / 2)
    return jnp.where(jnp.isfinite(rough), mended, rough)
