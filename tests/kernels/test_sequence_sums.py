"""Per-sequence sums against a loop, their gradient, and their edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_kernels import reference, sequence_sums

RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=50).astype(np.float32)
WEIGHTS = (RNG.normal(size=50) * (RNG.random(50) < 0.7)).astype(np.float32)
# Sequence 3 is empty, 5 has one token, ids past the end are padding.
SEGMENTS = np.sort(RNG.choice([0, 1, 2, 4, 6, 7, 9], size=50)).astype(np.int32)
SEGMENTS[np.flatnonzero(SEGMENTS == 6)[0]] = 5


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("op", [sequence_sums, reference.sequence_sums])
def test_sums_and_counts_against_a_loop(op, weights):
    given = None if weights is None else jnp.asarray(weights)
    sums, counts = op(jnp.asarray(VALUES), jnp.asarray(SEGMENTS), 8, weights=given)
    for r in range(8):
        rows = np.flatnonzero(SEGMENTS == r)
        w = np.ones(50) if weights is None else weights
        want = (w[rows] * VALUES[rows].astype(np.float64)).sum()
        np.testing.assert_allclose(sums[r], want, rtol=1e-5, atol=1e-6)
        assert int(counts[r]) == np.count_nonzero(w[rows])
    assert (SEGMENTS == 3).sum() == 0 and float(sums[3]) == float(counts[3]) == 0
    assert (SEGMENTS == 5).sum() == 1 and (SEGMENTS >= 8).any()


def test_gradients_of_values_and_weights():
    cotangent = jnp.asarray(RNG.normal(size=8), jnp.float32)

    def loss(op, values, weights):
        return op(values, jnp.asarray(SEGMENTS), 8, weights=weights)[0] @ cotangent

    args = jnp.asarray(VALUES), jnp.asarray(WEIGHTS)
    dvalues, dweights = jax.grad(lambda *a: loss(sequence_sums, *a), (0, 1))(*args)
    of_token = np.append(cotangent, [0, 0])[SEGMENTS]
    np.testing.assert_allclose(dvalues, of_token * WEIGHTS, rtol=1e-6)
    # A token of weight 0 is masked, for good.
    np.testing.assert_allclose(dweights, of_token * VALUES * (WEIGHTS != 0), rtol=1e-6)


def test_masked_and_padding_tokens_may_hold_anything():
    values = jnp.asarray([1.0, np.nan, 2.0, np.inf])
    segments = jnp.asarray([0, 0, 1, 2])
    weights = jnp.asarray([1.0, 0.0, 1.0, 1.0])

    def loss(values):
        return sequence_sums(values, segments, 2, weights=weights)[0].sum()

    total, gradient = jax.value_and_grad(loss)(values)
    assert total == 3
    np.testing.assert_array_equal(gradient, [1, 0, 1, 0])


def test_no_tokens_and_no_sequences():
    sums, counts = sequence_sums(jnp.zeros(0), jnp.zeros(0, jnp.int32), 3)
    assert not sums.any() and not counts.any()
    sums, _ = sequence_sums(jnp.ones(2), jnp.zeros(2, jnp.int32), 0)
    assert sums.shape == (0,)


def test_tokens_of_no_sequence_have_no_gradient():
    values = jnp.asarray([1.0, np.nan, 2.0])
    segments, weights = jnp.asarray([0, 7, -1]), jnp.asarray([2.0, 1.0, np.inf])

    def loss(values, weights):
        return sequence_sums(values, segments, 1, weights=weights)[0].sum()

    dvalues, dweights = jax.grad(loss, (0, 1))(values, weights)
    np.testing.assert_array_equal(dvalues, [2, 0, 0])
    np.testing.assert_array_equal(dweights, [1, 0, 0])


INTEGERS, FLOATS = jnp.zeros(2, jnp.int32), jnp.zeros(2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((jnp.zeros(3, jnp.int32), 1), "segment_ids is .3. and values is .2."),
        ((FLOATS, 1), "segment_ids is float32; it must hold integers"),
        ((INTEGERS,), "num_segments=None must be given with segment_ids"),
        ((), "neither of segment_ids and offsets"),
        ((INTEGERS, 1, {"offsets": INTEGERS}), "both of segment_ids and offsets"),
        ((None, 1, {"offsets": INTEGERS}), "num_segments=1 must be given with segm"),
        ((INTEGERS, 1, {"weights": jnp.zeros(3)}), "weights is .3."),
        ((INTEGERS, 1, {"weights": INTEGERS}), "weights is int32; .* cast it"),
        ((None, None, {"offsets": FLOATS}), "offsets is float32; it must hold int"),
        ((None, None, {"offsets": INTEGERS[0]}), "offsets is ..; it must be a vector"),
        ((None, None, {"offsets": INTEGERS[:0]}), "offsets is .0.; it must be a v"),
        ((INTEGERS, 1, {"implementation": "cuda"}), "unknown; use one of: auto, mos"),
    ],
)
def test_bad_arguments_are_named(unchecked, arguments, message):
    named = arguments[-1] if arguments and isinstance(arguments[-1], dict) else {}
    with pytest.raises(ValueError, match=message) as error:
        sequence_sums(FLOATS, *arguments[: len(arguments) - bool(named)], **named)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="values is int32.2.; it must be a float"):
        sequence_sums(INTEGERS, offsets=INTEGERS)
