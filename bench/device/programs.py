"""The JAX programs that are measured: the op, plain JAX, and the bare product.

What makes a function gives the same one for the same arguments, so that it need not be
compiled twice.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bench.device import plan
from dpo_kernels import token_logprobs
from dpo_kernels.op.backends import load_backend, supported_backends
from dpo_kernels.op.devices import traced_device
from dpo_kernels.op.tiling import Problem

BETA = 0.1
OURS = "dpo_kernels"
Logprobs = Callable[..., Array]  # of hidden, head, targets and num_valid


class Inputs(NamedTuple):
    """What every candidate is given; the reference is the DPO loss's."""

    hidden: Array
    head: Array
    targets: Array
    dlogprob: Array  # a cotangent for each token, of either sign
    num_valid: Array


@functools.partial(jax.jit, static_argnums=0)
def make_inputs(shape: plan.Shape, seed: int | Array = 0) -> Inputs:
    """Logits of standard deviation about 1, in bfloat16; the same in every process."""
    T, D, V = shape
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (T, D), jnp.float32)
    head = jax.random.normal(keys[1], (V, D), jnp.float32) * D**-0.5
    return Inputs(
        hidden=hidden.astype(jnp.bfloat16),
        head=head.astype(jnp.bfloat16),
        targets=jax.random.randint(keys[2], (T,), 0, V, jnp.int32),
        dlogprob=jax.random.normal(keys[3], (T,), jnp.float32),
        num_valid=jnp.int32(T),
    )


def problem(shape: plan.Shape) -> Problem:
    """The op at this shape in bfloat16, on the device that is here."""
    T, D, V = shape
    return Problem(
        T=T,
        D=D,
        V=V,
        dtype=jnp.dtype(jnp.bfloat16),
        workspace_bytes=plan.WORKSPACE,
        device=traced_device(),
        ragged=False,
    )


def backends(shape: plan.Shape) -> tuple[str, ...]:
    """What can do that, the fastest first."""
    return supported_backends(problem(shape))


def missing(shape: plan.Shape, name: str) -> str | None:
    """Why that backend cannot."""
    try:
        load_backend(name, problem(shape))
    except NotImplementedError as error:
        return str(error)
    return None


def matmul(inputs: Inputs) -> Array:
    """The logits in bfloat16, as a bare product leaves them."""
    return jnp.einsum("TD,VD->TV", inputs.hidden, inputs.head)


@functools.cache
def ours(implementation: str, workspace: int, padded: bool = False) -> Logprobs:
    """The op on one backend."""

    def call(hidden: Array, head: Array, targets: Array, num_valid: Array) -> Array:
        return token_logprobs(
            hidden,
            head,
            targets,
            num_valid=num_valid if padded else None,
            workspace_bytes=workspace,
            implementation=implementation,
        ).logprob

    return call


@functools.cache
def peer(f: Callable[..., Array]) -> Logprobs:
    """Plain JAX, which knows nothing of padding."""
    return lambda hidden, head, targets, num_valid: f(hidden, head, targets)


@functools.cache
def forward(f: Logprobs) -> Callable[[Inputs], Array]:
    """2TDV."""
    return lambda x: f(x.hidden, x.head, x.targets, x.num_valid)


@functools.cache
def gradient(f: Logprobs) -> Callable[[Inputs], Any]:
    """Log-probabilities and the gradients of hidden and head, 8TDV or 6TDV."""

    def call(x: Inputs) -> Any:
        def loss(hidden: Array, head: Array) -> tuple[Array, Array]:
            logprob = f(hidden, head, x.targets, x.num_valid)
            return (logprob * x.dlogprob.astype(logprob.dtype)).sum(), logprob

        value_and_grad = jax.value_and_grad(loss, (0, 1), has_aux=True)
        (_, logprob), grads = value_and_grad(x.hidden, x.head)
        return logprob, grads

    return call


@functools.cache
def dpo_gradient(f: Logprobs, sequences: int) -> Callable[[Inputs, Inputs], Any]:
    """The sigmoid loss of 8 pairs and its gradients; the reference has a head too.

    10TDV, or 8TDV where the policy's logits are kept. Chosen sequences come first.
    """

    def call(x: Inputs, reference: Inputs) -> Any:
        def logps(hidden: Array, head: Array) -> Array:
            logprob = f(hidden, head, x.targets, x.num_valid)
            return logprob.reshape(sequences, -1).sum(axis=1)

        def loss(hidden: Array, head: Array) -> Array:
            ref = lax.stop_gradient(logps(reference.hidden, reference.head))
            chosen, rejected = jnp.split(logps(hidden, head) - ref, 2)
            return -jax.nn.log_sigmoid(BETA * (chosen - rejected)).mean()

        return jax.value_and_grad(loss, (0, 1))(x.hidden, x.head)

    return call


def abstract(shape: plan.Shape, _: int = 0) -> Inputs:
    """As `make_inputs`, without the values: enough to compile for."""
    return jax.eval_shape(lambda: make_inputs(shape))
