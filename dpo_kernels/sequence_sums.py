"""Per-sequence sums of per-token values."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def sequence_sums(
    values: Float[Array, " T"],
    segment_ids: Int[Array, " T"],
    num_segments: int,
    *,
    weights: Float[Array, " T"] | None = None,
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """Weighted sum of the values of each sequence, and how many tokens it counted.

        sums[r] = sum of weights[t] * values[t] over t with segment_ids[t] == r
        counts[r] = how many of those t have a weight other than 0

    A token whose id is outside [0, num_segments) belongs to no sequence; one of weight
    0 is masked: neither adds anything, even if its value is NaN. A sequence without
    tokens has sum 0 and count 0. The order of summation is fixed, so results are the
    same bit for bit. `sums` may be differentiated, `counts` may not.

    Returns:
        Both in the dtype of `values`.
    Raises:
        ValueError: arrays that are not vectors of one length.
    """
    for name, x in (("segment_ids", segment_ids), ("weights", weights)):
        if x is not None and (x.shape != values.shape or values.ndim != 1):
            raise ValueError(
                f"{name} is {list(x.shape)} and values is {list(values.shape)}; both "
                "must be vectors of the same length"
            )
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids is {segment_ids.dtype}; it must hold integers")
    counted_T = jnp.ones(values.shape, bool) if weights is None else weights != 0
    # Masked by `where` before the product: 0 * NaN is NaN, forward and backward.
    masked_T = jnp.where(counted_T, values, jnp.zeros_like(values))
    if weights is not None:
        masked_T = masked_T * weights.astype(values.dtype)
    # A comparison and a sum that XLA fuses: [R, T] is never stored, and unlike a
    # scatter it adds in the same order on every run, GPUs included.
    member_RT = (
        segment_ids[None] == jnp.arange(num_segments, dtype=segment_ids.dtype)[:, None]
    )
    zero = jnp.zeros((), values.dtype)
    sums_R = jnp.where(member_RT, masked_T[None], zero).sum(axis=1)
    counts_R = (member_RT & counted_T[None]).sum(axis=1).astype(values.dtype)
    return sums_R, lax.stop_gradient(counts_R)
