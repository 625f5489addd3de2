"""The op against float64, and what its options promise."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from dpo_kernels import reference, token_logprobs
from dpo_kernels.op.interface import STATS
from dpo_kernels.verify import table as verify
from dpo_kernels.verify.cases import FLOOR, SLACK
from dpo_kernels.verify.table import CASES, Case, evaluate, make_inputs, relative_error

ALL = CASES[-1]
RAGGED = (300, 64, 1003)
SMALL_WORKSPACE = 2**19  # several chunks of the vocabulary, several blocks of rows


def small(*args, **kwargs):
    return token_logprobs(*args, workspace_bytes=SMALL_WORKSPACE, **kwargs)


EITHER = itertools.cycle(("float32", "bfloat16"))
# Every shape with all options on, the ragged one in every dtype; without options in
# another dtype.
# For each instruction set one shape is enough: ragged, with several blocks; and of the
# dtypes those that are trained in. For SSE4.2, jaxlib 0.11.2 compiles no float16: it
# does not find the functions that convert it.
OLDER = (RAGGED, "float32"), (RAGGED, "bfloat16")
GRID = [
    pytest.param(
        *(shape, dtype, case),
        marks=[pytest.mark.numerics] * (case is ALL and (shape[:3], dtype) in OLDER),
        id=f"{shape}-{dtype}-{case.name}",
    )
    for shape, dtype, case in [
        *itertools.product(verify.SHAPES[2:3], verify.DTYPES, (ALL,)),
        *(
            (shape, dtype, ALL)
            for shape, dtype in zip(verify.SHAPES, EITHER, strict=False)
            if shape[:3] != RAGGED
        ),
        *zip(verify.SHAPES, itertools.cycle(verify.DTYPES), itertools.repeat(CASES[1])),
    ]
]


@pytest.mark.parametrize("shape, dtype, case", GRID)
def test_errors_are_within_the_bound_that_plain_jax_sets(x64, dtype, shape, case):
    row = verify.verify_case("xla", dtype, shape, case)
    assert row.passed, str(row)


@pytest.mark.parametrize("case", CASES[2:4], ids=lambda case: case.name)
def test_each_option_alone(x64, case):
    assert verify.verify_case("xla", "float32", verify.SHAPES[2], case).passed


def test_the_small_workspace_makes_several_chunks_and_row_blocks(monkeypatch):
    """Else the tests above would not see a chunk's or a block's edge."""
    from dpo_kernels.op import tiling
    from dpo_kernels.op.devices import Device

    T, D, V = RAGGED
    problem = tiling.Problem(
        T=T,
        D=D,
        V=V,
        dtype=jnp.dtype(jnp.bfloat16),
        workspace_bytes=SMALL_WORKSPACE,
        device=Device(platform="cpu", kind="cpu"),
        ragged=True,
    )
    forward = tiling.xla_forward_tile(problem)
    for tile in (forward, tiling.backward_tile(problem, fused=False)):
        assert RAGGED[0] > tile.block_t and RAGGED[0] % tile.block_t
        assert RAGGED[2] > tile.chunk_v and RAGGED[2] % tile.chunk_v


def test_float16_gradients_survive_small_cotangents(x64):
    """DPO's coefficients are beta / B and less; times p they are below float16."""
    inputs = make_inputs(64, 32, 500, CASES[0], "float16")
    # Logits' gradients of about 1e-9 add up to gradients that float16 can hold.
    inputs = dataclasses.replace(inputs, cotangents=1e-6 + 0 * inputs.cotangents)
    inputs.arrays["hidden"][:] = abs(inputs.arrays["hidden"]) * 100
    inputs.arrays["head"][:] /= 100
    truth = evaluate(reference.token_logprobs, inputs, "float64")[1]["head"]
    plain = evaluate(reference.token_logprobs, inputs, "float16")[1]["head"]
    ours = evaluate(small, inputs, "float16")[1]["head"]
    bound = SLACK * relative_error(plain, truth) + FLOOR
    assert relative_error(ours, truth) < bound


def test_padding_rows_give_zero_and_get_zero_in_one_program(x64):
    """Whatever they hold; the count is an argument, as a batch's is."""
    inputs = make_inputs(*RAGGED, Case(name="", stats=STATS), "float32")
    arrays, T = inputs.arrays, RAGGED[0]

    def op(*args, **kwargs):
        return small(*args, **kwargs)

    for num_valid in (0, 1, 256, 257, 1000):
        valid = (np.arange(T) < num_valid)[:, None]
        hidden = {"hidden": np.where(valid, arrays["hidden"], np.float32(np.nan))}
        padded = dataclasses.replace(
            inputs, arrays=arrays | hidden, num_valid=num_valid
        )
        out, grads = evaluate(op, padded, "float32")
        for x in jax.tree.leaves((out, grads["hidden"])):
            assert not np.asarray(x[num_valid:]).any(), num_valid
        # The rest is as good as plain JAX where the other rows count for nothing.
        alone = dataclasses.replace(inputs, cotangents=inputs.cotangents * valid[:, 0])
        truth, plain = (
            evaluate(reference.token_logprobs, alone, dtype)
            for dtype in ("float64", "float32")
        )
        errors = [
            relative_error(_valid(results, num_valid), _valid(truth, num_valid))
            for results in ((out, grads), plain)
        ]
        assert errors[0] < SLACK * errors[1] + FLOOR, num_valid
    assert verify.program(op, inputs.options)._cache_size() == 1


def _valid(results: verify.Results, num_valid: int) -> verify.Results:
    """Of the valid rows; the gradient of the head is of all."""
    out, grads = results
    out, dhidden = jax.tree.map(lambda x: x[:num_valid], (out, grads["hidden"]))
    return out, grads | {"hidden": dhidden}


def test_a_bias_of_minus_infinity_equals_a_smaller_vocabulary():
    """With a soft-cap that would make the masked logits finite, if it came second."""
    case = Case(name="", softcap=2.0, stats=STATS)
    inputs = make_inputs(40, 32, 300, case, "float32")
    keep = np.setdiff1d(np.arange(300), np.arange(5, 300, 4))
    targets = np.arange(40, dtype=np.int32) % len(keep)
    cut = dataclasses.replace(
        inputs,
        arrays={k: x[keep] if k == "head" else x for k, x in inputs.arrays.items()},
        targets=targets,
    )
    bias = np.full(300, -np.inf, np.float32)
    bias[keep] = 0
    masked = dataclasses.replace(
        inputs,
        arrays=inputs.arrays | {"bias": bias},
        targets=keep[targets].astype(np.int32),
    )
    want, want_grads = evaluate(small, cut, "float32")
    got, grads = evaluate(small, masked, "float32")
    assert relative_error(got, want) < 1e-6
    assert relative_error(grads["hidden"], want_grads["hidden"]) < 1e-6
    assert relative_error(grads["head"][keep], want_grads["head"]) < 1e-6
    gone = np.setdiff1d(np.arange(300), keep)
    assert not np.asarray(grads["head"])[gone].any()
    assert not np.asarray(grads["bias"])[gone].any()


def test_a_vocabulary_that_is_masked_away_gives_no_nan():
    hidden, head = jnp.ones((3, 4)), jnp.ones((5, 4))

    def loss(hidden, head):
        bias = jnp.full((5,), -jnp.inf)
        out = token_logprobs(hidden, head, jnp.zeros(3, jnp.int32), bias=bias)
        return jnp.where(out.lse == -jnp.inf, 0.0, out.lse).sum(), out

    value_and_grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, out), grads = value_and_grad(hidden, head)
    assert (out.lse == -jnp.inf).all()
    assert not any(np.asarray(g).any() for g in grads)


def test_a_target_outside_the_vocabulary_is_impossible():
    targets = jnp.asarray([-1, 5], jnp.int32)
    out = jax.jit(token_logprobs)(jnp.ones((2, 4)), jnp.ones((5, 4)), targets)
    assert (np.asarray(out.logprob) == -np.inf).all() and np.isfinite(out.lse).all()


def test_second_opinion_on_the_gradients(x64):
    inputs = make_inputs(6, 5, 17, Case(name="", bias=True), "float64")
    finite = np.nan_to_num(inputs.arrays["bias"], neginf=-1.0)
    targets = jnp.asarray(inputs.targets)

    @jax.jit
    def op(hidden, head, bias):
        out = token_logprobs(hidden, head, targets, bias=bias, softcap=2.0, scale=0.5)
        return out.logprob, out.lse

    args = (inputs.arrays["hidden"], inputs.arrays["head"], finite)
    check_grads(op, tuple(map(jnp.asarray, args)), order=1, modes=("rev",))


def test_stats_carry_no_gradient():
    def loss(hidden):
        head = jnp.eye(8)[:, :4]
        out = token_logprobs(hidden, head, jnp.arange(3), stats=STATS)
        return sum(getattr(out, name).astype(jnp.float32).sum() for name in STATS)

    assert not np.asarray(jax.jit(jax.grad(loss))(jnp.ones((3, 4)))).any()


def test_stats_that_were_not_asked_for_are_none():
    out = token_logprobs(jnp.ones((2, 4)), jnp.ones((5, 4)), jnp.arange(2))
    assert [getattr(out, name) for name in STATS] == [None] * 4


@pytest.mark.parametrize("T, V", [(0, 7), (3, 0)])
def test_no_tokens_or_no_vocabulary(T, V):
    def loss(hidden, head):
        out = token_logprobs(hidden, head, jnp.zeros(T, jnp.int32), stats=STATS)
        return jnp.where(jnp.isfinite(out.lse), out.lse, 0.0).sum(), out

    args = jnp.ones((T, 4)), jnp.ones((V, 4))
    (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(*args)
    assert out.logprob.shape == out.top1.shape == (T,)
    assert [g.shape for g in grads] == [(T, 4), (V, 4)]


def matmuls(fn, *args) -> int:
    """How many dot_generals the compiled program has, loop bodies counted once."""
    text = jax.jit(fn).lower(*args).compile().as_text() or ""
    return sum(" dot(" in line or "matmul" in line for line in text.splitlines())


def test_a_frozen_head_costs_no_gradient_of_the_head():
    hidden, head = jnp.ones((64, 32)), jnp.ones((128, 32))
    targets = jnp.zeros(64, jnp.int32)

    def loss(hidden, head):
        return token_logprobs(hidden, head, targets).logprob.sum()

    frozen = matmuls(jax.grad(loss, 0), hidden, head)
    both = matmuls(jax.grad(loss, (0, 1)), hidden, head)
    assert both == frozen + 1


def test_full_logits_never_exist():
    T, D, V = 512, 64, 8192
    shapes = (jax.ShapeDtypeStruct((T, D), "float32"),)
    shapes += (jax.ShapeDtypeStruct((V, D), "float32"),)
    shapes += (jax.ShapeDtypeStruct((T,), "int32"),)

    def loss(hidden, head, targets):
        return token_logprobs(
            hidden, head, targets, workspace_bytes=2**20
        ).logprob.sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    budget = 2**20 + 4 * T * D + 2**20  # workspace, float32 d hidden, partials
    assert memory.temp_size_in_bytes < budget < 4 * T * V / 4


def test_the_same_inputs_give_the_same_bits():
    inputs = make_inputs(*RAGGED, ALL, "bfloat16")
    first = evaluate(small, inputs, "bfloat16")
    for _ in range(3):
        again = evaluate(small, inputs, "bfloat16")
        same = jax.tree.map(lambda a, b: (a == b).all() | (a != a).all(), first, again)
        assert all(jax.tree.leaves(same))


GOOD = {
    "hidden": np.ones((3, 4), np.float32),
    "head": np.ones((5, 4), np.float32),
    "targets": np.zeros(3, np.int32),
}


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"head": np.ones((4, 5), np.float32)}, "transpose a"),
        ({"head": np.ones((5, 4), np.float16)}, "head is float16; both must be the"),
        ({"targets": np.zeros(2, np.int32)}, "vector of length T=3"),
        ({"targets": np.zeros(3, np.float32)}, "must be an integer vector"),
        ({"bias": np.zeros(4, np.float32)}, "vector of length V=5"),
        ({"num_valid": 1.5}, "num_valid=1.5 must be an integer scalar"),
        ({"softcap": 0.0}, "softcap=0.0 must be above 0"),
        ({"stats": ("perplexity",)}, "distinct names out of entropy"),
        ({"implementation": "cuda"}, "implementation='cuda' is unknown; use one of"),
        ({"workspace_bytes": 100}, "workspace_bytes=100 is too small"),
    ],
)
def test_bad_arguments_are_named(unchecked, bad, message):
    args: dict[str, Any] = {
        k: jnp.asarray(v) if isinstance(v, np.ndarray) else v
        for k, v in (GOOD | bad).items()
    }
    with pytest.raises(ValueError, match=message):
        token_logprobs(**args)
