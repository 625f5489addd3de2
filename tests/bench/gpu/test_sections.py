"""`make bench-gpu` rehearsed: what its sections compute, at tiny shapes on the CPU."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import rows
from bench.device import plan, programs
from bench.gpu import (
    correctness,
    peers_torch,
    sanitizer,
    search,
    shared,
    sizes,
)
from bench.op.peers import cross_entropy, in_chunks
from dpo_kernels.verify import real as verify_real
from tests.bench.gpu.context import MAIN, TINY, context_at, events


def real_case(**changes):
    one = correctness.cases(rehearse=True)[0]
    return dataclasses.replace(one, **changes)


@pytest.mark.parametrize("wrong", ["logprob", "gradient", "bits"])
def test_a_wrong_real_case_fails(wrong, monkeypatch):
    right, calls = verify_real.token_logprobs, []

    def op(hidden, head, targets, **kwargs):
        if wrong == "gradient":
            head = jax.lax.stop_gradient(head)
        if wrong == "bits":

            def noise():
                calls.append(None)
                return np.float32(1e-6 * len(calls))

            shape = jax.ShapeDtypeStruct((), jnp.float32)
            out = right(hidden, head, targets, **kwargs)
            return out._replace(lse=out.lse + jax.pure_callback(noise, shape))
        out = right(hidden, head, targets, **kwargs)
        return out._replace(logprob=out.logprob * 1.01) if wrong == "logprob" else out

    monkeypatch.setattr(verify_real, "token_logprobs", op)
    use = verify_real.Compiler()
    (compute,) = verify_real.CaseCheck(
        real_case(case=verify_real.PLAIN), ["xla"], use
    ).rows(runs=2)
    found = compute()
    assert not found.passed
    assert found.row.passed == (wrong == "bits")


def test_the_truth_in_blocks_is_the_truth():
    one = real_case(shape=(12, 16, 301, 2**20))
    inputs = verify_real.make_inputs(one)
    whole = verify_real.evaluation(verify_real.reference.token_logprobs, one)
    with jax.enable_x64(True):
        wide = verify_real.widened(inputs)
        expected = jax.jit(whole)(wide)
        verify_real.BLOCK_T, kept = 4, verify_real.BLOCK_T
        found = jax.jit(verify_real.evaluation(verify_real.in_blocks, one))(wide)
        verify_real.BLOCK_T = kept
        errors = verify_real.relative_errors(found, expected)
        assert verify_real.largest(errors) < 1e-12


def test_chunks_of_tokens_are_the_same_loss():
    x = programs.make_inputs(MAIN)
    whole = jax.jit(cross_entropy)(x.hidden, x.head, x.targets)
    chunks = jax.jit(in_chunks, static_argnames="rows")(
        x.hidden, x.head, x.targets, rows=10
    )
    np.testing.assert_allclose(chunks, whole, rtol=1e-6)


def test_a_peer_that_is_not_installed_has_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    peers_torch.run(context_at(tmp_path))
    found = events(tmp_path, "row")
    assert {row["missing"] for row in found} == {"torch is not installed"}
    assert {row["implementation"] for row in found} >= {
        "cut-cross-entropy",
        "Liger DPO loss",
        "torch.compile",
    }


def test_the_sanitizer_counts_errors(tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        '#!/bin/sh\necho "$@"; echo finished; echo "== ERROR SUMMARY: 2 errors"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("XLA_FLAGS", "")
    context = context_at(tmp_path)
    sanitizer.check(context, str(program), "memcheck", "xla")
    (row,) = events(tmp_path, "row")
    assert row["errors_found"] == 2 and not row["passed"]
    assert sanitizer.count_errors("finished\nRACECHECK SUMMARY: 0 hazards") == 0
    assert sanitizer.count_errors("ERROR SUMMARY: 0 errors") is None


def test_a_tile_is_changed_for_one_program_only():
    x = programs.make_inputs(MAIN)
    space = search.SPACES["xla"]
    call = programs.forward(programs.ours("xla", plan.WORKSPACE))
    texts = [
        jax.jit(search.with_tile(space, changes, call)).lower(x).as_text()
        for changes in ({}, {"chunk_v": 64}, {"chunk_v": 128}, {})
    ]
    assert len(set(texts[:3])) == 3 and texts[0] == texts[3]


def test_search_writes_every_candidate_and_names_a_winner(
    tmp_path, capsys, monkeypatch
):
    space = dataclasses.replace(search.SPACES["xla"], fields={"block_t": (16, 10**6)})
    monkeypatch.setitem(search.SPACES, "xla", space)
    monkeypatch.setattr(search, "OPS", {plan.FORWARD: programs.forward})
    monkeypatch.setattr(sizes, "REHEARSAL", TINY)
    output = tmp_path / "tiles.json"
    assert search.main(["--rehearse", "--output", str(output)]) == 0
    found = rows.read(output)
    assert {row["setting"] for row in found} == {
        "as it is",
        "block_t=16",
        "block_t=1000000",
    }
    (broken,) = (row for row in found if row["setting"] == "block_t=1000000")
    assert "error" in broken
    assert "fastest tile" in capsys.readouterr().out


def test_arrays_travel_as_files(tmp_path):
    x = np.asarray(jnp.asarray([1.5, -2.0], jnp.bfloat16))
    shared.save(tmp_path, MAIN, "x", x)
    bits = shared.load(tmp_path, MAIN, "x")
    assert bits is not None and bits.dtype == np.uint16
    np.testing.assert_array_equal(bits.view(x.dtype), x)
    assert shared.load(tmp_path, MAIN, "y") is None
