"""`sequence_sums` in plain JAX: a comparison and a sum that XLA fuses.

[R, T] is never stored, and unlike a scatter a sum adds in the same order on every run,
GPUs included.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dpo_kernels.op.interface import accumulator
from dpo_kernels.op.sums import Problem


def unsupported(problem: Problem) -> str | None:
    """None: this one runs anywhere."""
    del problem


def sums_by_id(
    values: Float[Array, " T"],
    weights: Float[Array, " T"] | None,
    ids: Int[Array, " T"],
    num_ids: int,
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """Sums and counts of the tokens of each id below `num_ids`, float32 or wider."""
    acc = accumulator(values.dtype)
    if ids.dtype.itemsize < 4:
        ids = ids.astype(jnp.int32)  # an int8 may not hold `num_ids`
    counted_T = (ids >= 0) & (ids < num_ids)
    if weights is not None:
        counted_T &= weights != 0
    # Masked by `where` before the product: 0 * NaN is NaN, forward and backward.
    masked_T = jnp.where(counted_T, values, jnp.zeros_like(values)).astype(acc)
    if weights is not None:
        masked_T = masked_T * weights.astype(acc)
    # One comparison: XLA for GPUs stores the result of two, as of an interval's ends.
    member_RT = ids[None] == jnp.arange(num_ids, dtype=ids.dtype)[:, None]
    zero = jnp.zeros((), acc)
    sums_R = jnp.where(member_RT, masked_T[None], zero).sum(axis=1)
    counts_R = (member_RT & counted_T[None]).sum(axis=1).astype(acc)
    return sums_R, counts_R


def _ids(problem: Problem, offsets: Int[Array, " R1"]) -> Int[Array, " T"]:
    """The sequence of each token: -1 before the first, R after the last."""
    token_T = jnp.arange(problem.T, dtype=jnp.int32)
    end_T = jnp.searchsorted(offsets, token_T, side="right", method="scan_unrolled")
    # The barrier keeps XLA from searching anew for each of the R comparisons.
    return lax.optimization_barrier(end_T - 1)


def forward(
    problem: Problem,
    values: Float[Array, " T"],
    weights: Float[Array, " T"] | None,
    offsets: Int[Array, " R1"],
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """See `SumsBackend.forward`."""
    return sums_by_id(values, weights, _ids(problem, offsets), problem.R)


def backward(
    problem: Problem,
    values: Float[Array, " T"] | None,
    weights: Float[Array, " T"] | None,
    offsets: Int[Array, " R1"],
    dsums: Float[Array, " R"],
) -> tuple[Float[Array, " T"], Float[Array, " T"] | None]:
    """See `SumsBackend.backward`."""
    ids_T = _ids(problem, offsets)
    inside_T = (ids_T >= 0) & (ids_T < problem.R)
    zero = jnp.zeros((), dsums.dtype)
    dsum_T = jnp.where(inside_T, dsums[jnp.clip(ids_T, 0, problem.R - 1)], zero)
    if weights is None:
        return dsum_T.astype(problem.dtype), None
    # Masked after the product, which may be NaN in tokens that are not counted.
    counted_T = inside_T & (weights != 0)
    dvalues = jnp.where(counted_T, dsum_T * weights.astype(dsum_T.dtype), zero)
    dvalues = dvalues.astype(problem.dtype)
    if values is None:
        return dvalues, None
    dweights = jnp.where(counted_T, dsum_T * values.astype(dsum_T.dtype), zero)
    return dvalues, dweights.astype(weights.dtype)
