"""The TPU kernels compile for every generation, none of which has to be here."""

import json
import sys

import pytest

from bench import compiled, processes, rows
from bench.tpu import aot as tpu_aot
from bench.tpu.aot import PARALLEL, Program
from bench.tpu.chips import CHIPS

GOOD = {"temp_bytes": 1, "bound_bytes": 1}
GOOD |= {"kernels": ["token_logprobs_backward", "token_logprobs_forward"]}


def test_every_program_compiles_within_the_promise():
    """With everything on, few rows too; over four chips as the engine calls it."""
    results = compiled.rows_of("tpu")
    found = {(row["device"], row["devices"], row["T"]) for row in results}
    single = {(f"TPU {x}, ahead of time", 1, T) for x in CHIPS for T in (4096, 17, 1)}
    assert found == {*single, ("TPU 7x, ahead of time", PARALLEL["7x"], 4096)}
    assert [tpu_aot.problems(row) for row in results] == [[]] * len(results)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"temp_bytes": 2}, "temporaries above the bound"),
        ({"kernels": []}, "auto did not choose pallas_tpu"),
        (
            {"kernels": ["token_logprobs_forward"]},
            "no gradient's kernel was compiled",
        ),
        ({"error": "RESOURCE_EXHAUSTED"}, "does not compile: RESOURCE_EXHAUSTED"),
    ],
)
def test_what_does_not_fit_is_named(change, problem):
    assert tpu_aot.problems(GOOD | change) == ([] if problem is None else [problem])


def test_kernels_are_those_of_the_custom_calls():
    text = """
  %jvp_token_logprobs_forward_.1 = f32[3,8,128] custom-call(%x),
    custom_call_target="tpu_custom_call"
  %jvp_token_logprobs_forward_.1 = f32[3] custom-call(), target="tpu_custom_call"
  %a_token_logprobs_backward__.2 = f32[3] custom-call(), target="tpu_custom_call"
  %fusion.token_logprobs_other = f32[3] fusion()
"""
    assert tpu_aot.kernels(text) == [
        "token_logprobs_backward",
        "token_logprobs_forward",
    ]


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("start\\nF0000 check failed", "F0000 check failed"),
        ("start\\nMosaicError: no\\n\\nPlease report", "MosaicError: no"),
    ],
)
def test_a_compiler_that_dies_costs_its_own_program_only(
    monkeypatch, tmp_path, printed, said
):
    """A worker that dies at the second program; the next one does the third."""
    worker = tmp_path / "worker"
    worker.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "for word in sys.argv[4:]:\n"
        "    one = json.loads(word)\n"
        "    if one['variant'] == 'plain':\n"
        f"        print('{printed}', flush=True)\n"
        "        sys.exit(1)\n"
        f"    print({processes.MARK!r} + json.dumps(one), flush=True)\n"
    )
    worker.chmod(0o755)
    monkeypatch.setattr(tpu_aot.sys, "executable", str(worker))
    programs = [
        Program(generation="v6e", shape=(1, 2, 3), variant=variant)
        for variant in ("engine", "plain", "everything")
    ]
    first, died, last = tpu_aot.measure_elsewhere(programs)
    assert (first["variant"], last["variant"]) == ("engine", "everything")
    assert died["error"] == f"the compiler died: {said}"
    assert tpu_aot.problems(died) and json.dumps(died)


def test_a_program_that_does_not_fit_makes_the_command_fail(monkeypatch, capsys):
    row = tpu_aot._row(
        Program(generation="7x", shape=(8, 128, 256)), error="no room", compile_s=0.0
    )
    monkeypatch.setattr(tpu_aot, "measure_elsewhere", lambda _: iter([row]))
    monkeypatch.setattr(rows, "write_to", None)  # --quick writes nothing
    assert tpu_aot.main(["--quick"]) == 1
    assert "does not compile: no room" in capsys.readouterr().out


def test_everything_has_all_generations_variants_and_the_cut_vocabulary():
    every = tpu_aot.programs(quick=False)
    assert len(set(every)) == len(every)
    assert {one.generation for one in every} == {"v5e", "v5p", "v6e", "7x"}
    assert {one.variant for one in every} == {"plain", "engine", "everything"}
    assert {one.devices for one in every} == {1, *PARALLEL.values()}
    assert len(tpu_aot.programs(quick=True)) == 4
