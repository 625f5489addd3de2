"""`make bench-tpu` rehearsed on the CPU, its kernels in an interpreter."""

import json
import os

import pytest

from bench import processes, rows
from bench.device import programs
from bench.device.subject import Subject
from bench.op.peers import cross_entropy
from bench.tpu import device as tpu_device
from bench.tpu import device_speed as tpu_device_speed
from bench.tpu.device_speed import HALF, generation_of, predicted_ms

FORWARD, GRADIENT = "token_logprobs, forward", "token_logprobs, forward and gradient"


def test_a_rehearsal_verifies_and_times_everything(tmp_path):
    """In a process of its own, as the interpreter's threads outlive a test."""
    output = tmp_path / "rows.json"
    words = processes.command(
        "bench.tpu.device", ["--rehearse", "--output", str(output)]
    )
    # Nearly all of its time is XLA's, and it is not for the times that this runs.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    done = processes.run(words, {"XLA_FLAGS": flags})
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    checked = [row for row in found if row["op"] == "verify"]
    assert [row["setting"] for row in checked] == ["bias, padded"]
    assert all(row["passed"] and row["same_bits"] for row in checked)
    timed = [row for row in found if row["op"] != "verify"]
    assert not [row for row in timed if "error" in row or row["ms"] <= 0]
    ours = [
        (row["op"], row["setting"])
        for row in timed
        if row["implementation"] == "pallas_tpu"
    ]
    assert ours == [(x, y) for x in (FORWARD, GRADIENT) for y in ("", HALF)]
    assert timed[0]["op"] == "matmul" and timed[0]["pct_peak"] == 100
    assert len(timed) == 9
    for line in (*ours, ("plain JAX, optax", "plain JAX, log_softmax")):
        assert line[0] in done.stdout


def test_without_a_tpu_one_line_and_2(monkeypatch, capsys):
    monkeypatch.setattr(tpu_device.processes, "first_device", lambda *_: ("cpu", ""))
    assert tpu_device.main([]) == 2
    out = capsys.readouterr().out
    assert out.startswith("no TPU that JAX can use was found") and out.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "generation"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5e", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "7x"),
        ("TPU v4", ""),
        ("cpu", ""),
    ],
)
def test_generations(kind, generation):
    assert generation_of(kind) == generation


def test_a_prediction_is_that_of_the_same_tpu_shape_and_padding(monkeypatch):
    def row(program, ms, valid=4, tpu="v6e", T=4):
        device = f"TPU {tpu}, ahead of time"
        about = {"implementation": program, "ms": ms, "valid": valid, "device": device}
        return about | {"T": T, "D": 5, "V": 6}

    committed = [
        row("forward", 1.0),
        row("forward", 0.5, valid=2),
        row("forward", 9.0, tpu="7x"),
        row("forward", 9.0, T=8, valid=8),
        row("backward", 3.0),
    ]
    monkeypatch.setattr(rows, "read", lambda _: committed)

    def guess(op, setting="", name="pallas_tpu"):
        subject = Subject(op=op, implementation=name, T=4, D=5, V=6, setting=setting)
        return predicted_ms(subject, "TPU v6 lite")

    assert guess(FORWARD) == 1.0
    assert guess(FORWARD, HALF) == 0.5
    assert guess(GRADIENT) == 4.0
    assert guess(GRADIENT, HALF) is None
    assert guess(FORWARD, name="XLA") is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"implementation": "pallas_tpu"}, True),
        ({"implementation": "pallas_tpu", "passed": True}, True),
        ({"implementation": "pallas_tpu", "passed": False}, False),
        ({"implementation": "pallas_tpu", "error": "no room"}, False),
        ({"implementation": "plain JAX, optax", "error": "no room"}, True),
    ],
)
def test_ours_must_be_right_and_run(row, expected):
    assert tpu_device.good(row) == expected


def test_what_cannot_run_is_a_row_and_costs_no_other(monkeypatch):
    def ready(function, inputs):
        return (None, "no room") if function in fail else real(function, inputs)

    call = programs.peer(cross_entropy)
    fail = programs.forward(call), programs.gradient(call)
    real = tpu_device_speed._ready
    monkeypatch.setattr(tpu_device_speed, "_ready", ready)
    monkeypatch.setattr(tpu_device_speed, "IMPLEMENTATION", "xla")
    plan = tpu_device.REHEARSAL.plan
    found = list(tpu_device_speed.speed((8, 16, 32), plan))
    failed = [row for row in found if "error" in row]
    assert [row["implementation"] for row in failed] == ["plain JAX, optax"] * 2
    assert len(found) == 9 and all(row["ms"] for row in found if row not in failed)


def test_what_is_too_large_for_plain_jax_is_not_verified(monkeypatch):
    class Small:
        def memory_stats(self):
            return {"bytes_limit": 16 * 2**30}

    monkeypatch.setattr(tpu_device.jax, "devices", lambda: [Small()])
    every = {case.shape[:3]: tpu_device.fits(case) for case in tpu_device.REAL.cases}
    assert every[4096, 4096, 128256] and not every[8192, 2304, 256000]
