"""Seeded inputs of the kernels, and what they give in float64."""

from collections.abc import Callable, Iterable
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np

from dpo_kernels import token_logprobs
from dpo_kernels.op.interface import TokenLogprobs
from dpo_kernels.verify import table
from dpo_kernels.verify.cases import Case, Row, Shape
from dpo_kernels.verify.table import Inputs


def arrays(
    T: int, D: int, V: int, dtype=jnp.bfloat16
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """hidden, head and targets; logits of standard deviation about 1."""
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(T, D)), rng.normal(size=(V, D)) / D**0.5
    targets = jnp.asarray(rng.integers(0, V, size=T), jnp.int32)
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), targets


def logits_of(hidden: jax.Array, head: jax.Array) -> np.ndarray:
    """In float64."""
    return np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T


def logprobs(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, valid: int
) -> tuple[np.ndarray, ...]:
    """lse, logprob, and the gradient of the latter's sum, in float64.

    All zero from row `valid` on, whatever is in it.
    """
    h, w = np.asarray(hidden, np.float64)[:valid], np.asarray(head, np.float64)
    z = logits_of(hidden[:valid], head)
    lse = np.log(np.exp(z).sum(axis=1))
    hit = np.arange(len(w))[None] == np.asarray(targets)[:valid, None]
    dz = hit - np.exp(z - lse[:, None])
    pad = len(hidden) - valid
    dhidden = np.pad(dz @ w, ((0, pad), (0, 0)))
    return np.pad(lse, (0, pad)), np.pad(z[hit] - lse, (0, pad)), dhidden, dz.T @ h


def forward(op: Callable[..., TokenLogprobs], inputs: Inputs, dtype: str):
    """What `op` gives for a row of `dpo verify`, without the gradient that it has."""

    @jax.jit
    def call(arrays, targets, num_valid) -> TokenLogprobs:
        return op(
            *(arrays["hidden"], arrays["head"], targets),
            bias=arrays.get("bias"),
            num_valid=num_valid,
            **asdict(inputs.options),
        )

    arrays = {name: jnp.asarray(x, dtype) for name, x in inputs.arrays.items()}
    valid = None if inputs.num_valid is None else jnp.int32(inputs.num_valid)
    return call(arrays, jnp.asarray(inputs.targets), valid)


def verify_cases(
    implementation: str, dtype: str, shape: Shape, cases: Iterable[Case]
) -> list[Row]:
    """As `verify.verify_case`; cases with the same options share a program."""
    T, D, V, workspace_bytes = shape

    def op(*args, **kwargs) -> TokenLogprobs:
        kwargs |= {"workspace_bytes": workspace_bytes}
        return token_logprobs(*args, implementation=implementation, **kwargs)

    def row(case: Case) -> Row:
        inputs, truth, bounds = table._truth(dtype, shape, case)
        ours = table.evaluate(op, inputs, dtype)
        forward, gradient = map(table.relative_error, ours, truth)
        return Row(
            implementation=implementation,
            dtype=dtype,
            shape=(T, D, V),
            case=case.name,
            forward=forward,
            forward_bound=bounds[0],
            gradient=gradient,
            gradient_bound=bounds[1],
        )

    return [row(case) for case in cases]
