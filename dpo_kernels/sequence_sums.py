"""Per-sequence sums of per-token values."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from dpo_kernels.op.devices import traced_device
from dpo_kernels.op.interface import accumulator
from dpo_kernels.op.loops import make_varying, varying_axes
from dpo_kernels.op.sums import Problem, SumsBackend, check_name, load_backend
from dpo_kernels.xla.sums import sums_by_id


def sequence_sums(
    values: Float[Array, " T"],
    segment_ids: Int[Array, " T"] | None = None,
    num_segments: int | None = None,
    *,
    offsets: Int[Array, " bounds"] | None = None,
    weights: Float[Array, " T"] | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, " R"], Float[Array, " R"]]:
    """Weighted sum of the values of each sequence, and how many tokens it counted.

        sums[r] = sum of weights[t] * values[t] over the tokens t of sequence r
        counts[r] = how many of those t have a weight other than 0

    The sequences are given in one of two ways. With `offsets`, of length R + 1, the
    tokens of r are offsets[r] to offsets[r + 1], the end excluded: one kernel adds them
    up, and one makes the gradient. With `segment_ids` and `num_segments`, which is R,
    they are those t with segment_ids[t] == r, in any order.

    A token outside all sequences adds nothing, nor does one of weight 0, which is
    masked, even if its value is NaN; both get gradient 0. A sequence without tokens has
    sum 0 and count 0. The order of summation is fixed, so results are the same bit for
    bit, but not between implementations. `sums` may be differentiated with respect to
    `values` and `weights`, `counts` may not.

    Args:
        offsets: must not decrease; one outside [0, T] counts as the nearer end. May be
            traced.
        implementation: `auto`, or one of `dpo_kernels.op.sums.BACKENDS`; how much a
            kernel can gain stands there. Segment ids are for `xla` alone.
    Returns:
        Both in float32, whatever the dtypes of `values` and `weights` (float64 for
        float64 values): a bfloat16 counts to 256 only. Gradients come in the dtype of
        what they are of.
    Raises:
        ValueError: arrays whose shapes or dtypes do not fit, both or neither of
            `offsets` and `segment_ids`, an unknown implementation.
        NotImplementedError: an implementation that does not cover the device, the
            dtypes, or segment ids.
    """
    _check(values, segment_ids, num_segments, offsets, weights)
    check_name(implementation)
    if offsets is None:
        assert segment_ids is not None and num_segments is not None, "checked"
        if implementation not in ("auto", "xla"):
            raise NotImplementedError(
                f"{implementation=} needs offsets; sort the tokens by sequence and "
                "give offsets, or use xla or auto"
            )
        sums, counts = sums_by_id(values, weights, segment_ids, num_segments)
        return sums, lax.stop_gradient(counts)
    axes = varying_axes(values, offsets, weights)
    R = offsets.shape[0] - 1
    if R == 0 or values.shape[0] == 0:
        nothing = make_varying(jnp.zeros((R,), accumulator(values.dtype)), axes)
        return nothing, nothing
    problem = Problem(
        T=values.shape[0],
        R=R,
        dtype=values.dtype,
        weights_dtype=None if weights is None else weights.dtype,
        device=traced_device(),
    )
    backend = load_backend(implementation, problem)
    # Inputs get the same varying axes before the vjp. So where one is replicated over
    # a mesh axis, JAX sums its gradient over it, and the vjp need not.
    values, offsets = (make_varying(x, axes) for x in (values, offsets))
    weights = None if weights is None else make_varying(weights, axes)
    offsets = offsets.astype(jnp.int32)
    return _of_offsets(backend, problem, values, weights, offsets)


def _check(values, segment_ids, num_segments, offsets, weights) -> None:
    if values.ndim != 1 or not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(
            f"values is {values.dtype}{list(values.shape)}; it must be a "
            "floating-point vector"
        )
    if (segment_ids is None) == (offsets is None):
        given = "neither" if offsets is None else "both"
        raise ValueError(
            f"{given} of segment_ids and offsets given; give one of them, to say which "
            "tokens make up each sequence"
        )
    if (segment_ids is None) != (num_segments is None):
        raise ValueError(
            f"{num_segments=} must be given with segment_ids, and only with them: "
            "offsets have a length that says how many sequences there are"
        )
    for name, x in (("segment_ids", segment_ids), ("weights", weights)):
        if x is not None and x.shape != values.shape:
            raise ValueError(
                f"{name} is {list(x.shape)} and values is {list(values.shape)}; both "
                "must be vectors of the same length"
            )
    for name, x in (("segment_ids", segment_ids), ("offsets", offsets)):
        if x is not None and not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} is {x.dtype}; it must hold integers")
    if weights is not None and not jnp.issubdtype(weights.dtype, jnp.floating):
        raise ValueError(
            f"weights is {weights.dtype}; it must hold floating-point numbers: cast it"
        )
    if offsets is not None and (offsets.ndim != 1 or offsets.shape[0] == 0):
        raise ValueError(
            f"offsets is {list(offsets.shape)}; it must be a vector of one more entry "
            "than there are sequences"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _of_offsets(backend: SumsBackend, problem: Problem, values, weights, offsets):
    return backend.forward(problem, values, weights, offsets)


def _vjp_forward(backend: SumsBackend, problem: Problem, values, weights, offsets):
    results = _of_offsets(
        backend,
        problem,
        values.value,
        None if weights is None else weights.value,
        offsets.value,
    )
    # The values are needed for the gradient of the weights alone.
    want_dweights = weights is not None and weights.perturbed
    kept_values = values.value if want_dweights else None
    kept_weights = None if weights is None else weights.value
    return results, (kept_values, kept_weights, offsets.value)


def _vjp_backward(backend: SumsBackend, problem: Problem, saved, cotangents):
    values, weights, offsets = saved
    dsums = cotangents[0]
    if isinstance(dsums, SymbolicZero):
        dsums = jnp.zeros((problem.R,), accumulator(problem.dtype))
    dvalues, dweights = backend.backward(problem, values, weights, offsets, dsums)
    return dvalues, dweights, None


_of_offsets.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
