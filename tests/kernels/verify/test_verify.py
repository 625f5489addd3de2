"""`dpo verify`: what it prints, and that a failure is seen."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_kernels import reference
from dpo_kernels.op.interface import STATS, LogitOptions
from dpo_kernels.verify import table as verify
from dpo_kernels.verify.table import Row

GOOD = Row(
    implementation="xla",
    dtype="bfloat16",
    shape=(256, 128, 1024),
    case="plain",
    forward=1e-6,
    forward_bound=1e-5,
    gradient=1e-3,
    gradient_bound=1e-2,
)


@pytest.mark.parametrize(
    "changes, code",
    [
        ({}, 0),
        ({"forward": 2e-5}, 1),
        ({"gradient": 2e-2}, 1),
        ({"gradient": float("inf")}, 1),
        ({"forward": float("nan")}, 1),
    ],
)
def test_one_failing_row_fails_the_table(changes, code, monkeypatch, capsys):
    table = [GOOD, dataclasses.replace(GOOD, **changes)]
    monkeypatch.setattr(verify, "rows", lambda *args: iter(table))
    assert verify.main([]) == code
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"{2 - code} passed, {code} failed"
    assert printed[-2].endswith("FAIL" if code else "pass")


def test_every_implementation_dtype_shape_and_case_has_a_row(monkeypatch):
    def row(implementation, dtype, shape, case):
        return dataclasses.replace(GOOD, dtype=dtype, shape=shape[:3], case=case.name)

    monkeypatch.setattr(verify, "verify_case", row)
    found = list(verify.rows(("xla",), verify.DTYPES, quick=False))
    assert len(set(map(str, found))) == 4 * len(verify.SHAPES) * len(verify.CASES)
    assert {row.case for row in found} >= {"bias", "softcap", "padded", "all", "huge"}


def test_a_wrong_result_is_an_infinite_or_large_error():
    truth = jnp.asarray([1.0, -2.0])
    assert verify.relative_error(truth, truth) == 0
    assert verify.relative_error(truth + 0.2, truth) == pytest.approx(0.1)
    assert verify.relative_error(truth * jnp.nan, truth) == float("inf")


def test_the_truth_is_compiled_once_for_all_dtypes():
    """And cases that differ in a count alone share their programs."""
    verify.program.cache_clear()
    verify._truth.cache_clear()
    cases = [case for case in verify.CASES if case.name in ("padded", "empty")]
    with jax.enable_x64(True):
        for dtype, case in itertools.product(verify.DTYPES, cases):
            verify._truth(dtype, (5, 8, 11, 2**28), case)
    program = verify.program(reference.token_logprobs, LogitOptions(stats=STATS))
    assert program._cache_size() == len(verify.DTYPES)


def test_logits_with_an_offset_are_exact_in_every_dtype():
    """So that errors are of what comes after them."""
    cases = [case for case in verify.CASES if case.offset]
    assert len(cases) == 2
    for shape, case in itertools.product(verify.SHAPES, cases):
        of_dtype = []
        for dtype in verify.DTYPES:
            arrays = verify.make_inputs(*shape[:3], case, dtype).arrays
            hidden, head = (arrays[x].astype(np.float64) for x in ("hidden", "head"))
            z = hidden @ head.T
            np.testing.assert_array_equal(z, z.astype(np.float32))
            of_dtype.append(z)
        assert all((z == of_dtype[0]).all() for z in of_dtype)
        spread = (of_dtype[0] - case.offset).std()
        assert 0 < spread < 16, "a few steps of float32 at the offset"


def test_one_asked_for_by_name_that_cannot_run_says_why(capsys):
    assert verify.main(["--implementation", "mosaic_gpu", "--dtype", "bfloat16"]) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert "implementation='mosaic_gpu' needs" in last and "use xla or auto" in last


def test_without_a_name_only_what_can_run_has_rows(monkeypatch):
    def row(implementation, dtype, shape, case):
        return dataclasses.replace(GOOD, implementation=implementation)

    monkeypatch.setattr(verify, "verify_case", row)
    found = verify.rows(tuple(verify.BACKENDS), ("bfloat16",), quick=True)
    assert {row.implementation for row in found} == {"xla"}


def test_real_shapes_are_another_table(monkeypatch, capsys):
    monkeypatch.setattr(verify.verify_real, "rows", lambda *args: iter([GOOD, GOOD]))
    assert verify.main(["--real", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 passed, 0 failed"
