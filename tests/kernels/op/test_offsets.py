"""Large logits in plain JAX: `token_logprobs` loses no more to them than log_softmax.

The other backends have the same checks in their own files, and all have the rows
`offset` and `huge` of `dpo verify`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpo_kernels import reference, token_logprobs
from dpo_kernels.verify import table as verify
from dpo_kernels.verify.cases import FLOOR, SLACK
from dpo_kernels.verify.table import CASES, evaluate, make_inputs, relative_error
from tests.kernels.offsets import (
    check_entries_masked_by_a_finite_bias,
    check_two_equal_logits_of_1e8,
)

OFFSETS = [case for case in CASES if case.offset]
# The vocabulary in one chunk whose exponentials are kept; in several, recomputed.
KEPT, RECOMPUTED = (67, 40, 300, 2**28), verify.SHAPES[3]


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_equal_logits_of_1e8(dtype):
    check_two_equal_logits_of_1e8("xla", dtype)


def test_entries_masked_by_a_finite_bias():
    check_entries_masked_by_a_finite_bias("xla", "float32")


@pytest.mark.parametrize(
    "shape, dtype",
    [(KEPT, "float32"), (RECOMPUTED, "float32"), (KEPT, "float16"), (KEPT, "float64")],
)
@pytest.mark.parametrize("case", OFFSETS, ids=lambda case: case.name)
def test_errors_are_within_the_bound_that_plain_jax_sets(x64, shape, dtype, case):
    row = verify.verify_case("xla", dtype, shape, case)
    assert row.passed, str(row)
    # The yardstick itself: rounding, not the offset.
    assert row.forward_bound < 2 * FLOOR


@pytest.mark.numerics
@pytest.mark.parametrize("workspace_bytes", [2**18, 2**24], ids=["chunks", "kept"])
def test_seventy_thousand_entries_at_a_thousand(workspace_bytes):
    """Of exact logits, by the error of jax.nn.log_softmax on the same ones."""
    T, V = 4, 70_000
    rng = np.random.default_rng(0)
    z = (1e3 + rng.normal(size=(T, V))).astype(np.float32)
    targets, rows = rng.integers(0, V, T), np.arange(T)
    weights = rng.normal(size=T).astype(np.float32)
    exact = z.astype(np.float64) - z.max(axis=1, keepdims=True)
    log_p = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    truth = log_p[rows, targets], -(np.exp(log_p) * log_p).sum(axis=1)
    hit = np.arange(V)[None] == targets[:, None]
    dtruth = weights[:, None] * (hit - np.exp(log_p))

    def ours(z):
        out = token_logprobs(
            *(jnp.eye(T), z.T, jnp.asarray(targets, jnp.int32)),
            stats=("entropy",),
            workspace_bytes=workspace_bytes,
            implementation="xla",
        )
        return (weights * out.logprob).sum(), (out.logprob, out.entropy)

    def plain(z):
        log_p = jax.nn.log_softmax(z)
        logprob, entropy = log_p[rows, targets], -(jnp.exp(log_p) * log_p).sum(axis=1)
        return (weights * logprob).sum(), (logprob, entropy)

    def errors(f):
        (_, values), dz = jax.jit(jax.value_and_grad(f, has_aux=True))(jnp.asarray(z))
        found = (*values, dz)
        pairs = zip(found, (*truth, dtruth), strict=True)
        return [np.abs(np.asarray(a, np.float64) - b).max() for a, b in pairs]

    ulp = 2.0**-23 * 16  # of what is between 8 and 16, as the logarithms here are
    for of_ours, of_plain in zip(errors(ours), errors(plain), strict=True):
        # By the absolute lse it would be half of 2**-14, which a float32 near 1e3
        # resolves: 3e-5.
        assert of_ours <= SLACK * of_plain + ulp / 2 < 1.5e-5


@pytest.mark.parametrize("case", OFFSETS, ids=lambda case: case.name)
def test_the_merge_over_devices(x64, case):
    """Four slices of the vocabulary, of which one has no entry."""
    inputs = make_inputs(24, 16, 90, case, "float32")
    truth = evaluate(reference.token_logprobs, inputs, "float64")
    plain = evaluate(reference.token_logprobs, inputs, "float32")
    head = np.pad(inputs.arrays["head"], ((0, 30), (0, 0)))
    bias = np.where(np.arange(120) < 90, 0, -np.inf).astype(np.float32)
    cut = dataclasses.replace(
        inputs, arrays=inputs.arrays | {"head": head, "bias": bias}
    )

    def op(hidden, head, targets, *, bias, num_valid, **options):
        return jax.shard_map(
            lambda h, w, b, t: token_logprobs(
                h, w, t, bias=b, axis_name="vocab", **options
            ),
            mesh=Mesh(np.array(jax.devices()[:4]), ("vocab",)),
            in_specs=(P(), P("vocab"), P("vocab"), P()),
            out_specs=P(),
        )(hidden, head, bias, targets)

    out, grads = evaluate(op, cut, "float32")
    ours = out, {"hidden": grads["hidden"], "head": grads["head"][:90]}
    for found, yardstick, true in zip(ours, plain, truth, strict=True):
        bound = SLACK * relative_error(yardstick, true) + FLOOR
        assert relative_error(found, true) < bound


def test_a_target_of_no_vocabulary_is_impossible():
    """-inf, as one outside the vocabulary: not NaN, which -inf - -inf would be."""
    out = token_logprobs(
        *(jnp.ones((3, 4)), jnp.ones((5, 4)), jnp.zeros(3, jnp.int32)),
        bias=jnp.full((5,), -jnp.inf),
    )
    np.testing.assert_array_equal(out.logprob, [-np.inf] * 3)
    np.testing.assert_array_equal(out.lse, [-np.inf] * 3)
