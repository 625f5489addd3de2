"""`make bench-gpu` rehearsed: no death or hang may cost other results."""

import dataclasses
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import rows
from bench.device import plan, timing
from bench.device.subject import Subject
from bench.gpu import clocks, plot, summary, supervisor
from bench.gpu.supervisor import Run, run_section
from bench.gpu.worker import Pulse
from tests.bench.gpu.context import MAIN, TINY, context_at, events


@pytest.fixture
def run_at(tmp_path):
    found = []
    return found, Run(
        work=tmp_path,
        rehearse=True,
        torch_python=sys.executable,
        hang_s=2.0,
        device="a GPU",
        take=found.append,
        log=lambda line: None,
    )


def test_what_dies_raises_or_hangs_gets_a_row_and_costs_no_other(run_at):
    found, run = run_at
    run_section(run, "tests.bench.gpu.dying_section", seconds=60)
    named = {row["implementation"]: row for row in found}
    assert len(found) == len(named) == 10
    for task in ("first", "second"):
        assert "ValueError: no such thing" in named[f"{task} raises"]["error"]
        assert "exit -6" in named[f"{task} dies"]["error"]
        assert named[f"{task} last"]["ms"] == 1000
        assert named[f"{task} last"]["pct_peak"] == 50
    assert named["second hangs"]["error"] == "hung for 2 s"
    assert {row["device"] for row in found} == {"a GPU"}
    assert {row["rehearsal"] for row in found} == {True}


def test_a_section_ends_with_its_time_and_says_what_is_missing(run_at, monkeypatch):
    found, run = run_at
    monkeypatch.setattr(supervisor, "GRACE_S", 0.3)
    late = run_section(
        dataclasses.replace(run, hang_s=60.0), "tests.bench.gpu.dying_section", 3
    )
    assert late == ["what it was at"]
    assert found[-1]["unfinished"] == "no time was left"
    assert "second last" not in {row["implementation"] for row in found}


def test_a_section_that_cannot_start_is_one_row(run_at):
    found, run = run_at
    run_section(run, "tests.no_such_module", seconds=60)
    assert [row["op"] for row in found] == ["tests.no_such_module"]
    assert "ModuleNotFoundError" in found[0]["error"]


def test_a_slow_compilation_is_not_hung(run_at):
    """Longer than the silence of `hang_s` that `test_what_dies...` has a row for."""
    found, run = run_at
    run_section(run, "tests.bench.gpu.slow_section", seconds=60)
    (row,) = found
    assert row["implementation"] == "compiles" and row["ms"] == 1000


def test_a_pulse_beats_as_long_as_something_goes_on():
    beats = []
    pulse = Pulse(lambda: beats.append(None), every_s=0.01)
    with pulse, pulse:
        time.sleep(0.2)
    assert beats
    time.sleep(0.05)  # the last one may just have begun
    before = len(beats)
    time.sleep(0.1)
    assert len(beats) == before


def test_no_section_chooses_products_by_what_another_one_timed(run_at):
    _, run = run_at
    run = dataclasses.replace(run, rehearse=False)
    flags = [run.environment(name)["XLA_FLAGS"] for name in ("correctness", "speed")]
    caches = [text.rpartition("autotune_cache_dir=")[2] for text in flags]
    assert caches[0] != caches[1] and all(Path(cache).is_dir() for cache in caches)
    assert run.environment("speed")["JAX_PLATFORMS"] == "cuda"


def test_rows_name_the_flags_that_were_asked_for(run_at, monkeypatch):
    found, run = run_at
    monkeypatch.setattr(supervisor, "XLA_FLAGS", "--xla_a=b")
    section = supervisor.Section(run=run, name="x", deadline=0.0)
    section.give(asdict(supervisor.nobody("x")))
    assert found[0]["xla_flags"] == "--xla_a=b"


def test_tasks_stop_when_time_is_over(tmp_path):
    context = context_at(tmp_path, seconds=0.0)
    assert list(context.tasks(["a", "b"])) == []
    assert events(tmp_path, "late") == ["a", "b"]


def test_candidates_take_turns_in_an_order_that_moves(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    took = {"a": 0.001, "b": 0.004}
    subjects = {
        name: Subject(op="", implementation=name, T=1, D=1, V=1) for name in took
    }

    def call(name):
        now[0] += took[name]
        order.append(name)

    sizes = dataclasses.replace(TINY, rounds=3, slice_s=0.004)
    calls = {subjects[name]: lambda name=name: call(name) for name in took}
    times = timing.take_turns(calls, lambda out: None, sizes, lambda subject: None)
    assert times[subjects["a"]].median == pytest.approx(0.001)
    assert times[subjects["b"]].median == pytest.approx(0.004)
    assert times[subjects["a"]].iterations == 4
    assert "".join(order) == "aabb" + "baaaa" + "aaaab" + "baaaa"


def test_clocks_are_what_nvidia_smi_knows():
    assert clocks.parse_clocks("1980, 3201, [N/A], 41\n") == {
        "sm_mhz": 1980,
        "memory_mhz": 3201,
        "celsius": 41,
    }
    assert clocks.parse_clocks("") == {}


def made(op, implementation, ms, peak, setting="", **rest):
    return {
        **rows.row(op, implementation, T=64, D=32, V=301, dtype="bfloat16", device="x"),
        **{"ms": ms, "peak_bytes": peak, "setting": setting, "section": "speed"},
        **rest,
    }


def test_a_peer_is_beaten_at_no_more_memory_only():
    lean = made(plan.GRADIENT, "dpo_kernels xla", 5.0, 100, "256 MiB")
    fast = made(plan.GRADIENT, "dpo_kernels xla", 2.0, 900, "1024 MiB")
    peers = [
        made(plan.GRADIENT, "hungry", 3.0, 1000),
        made(plan.GRADIENT, "frugal", 3.0, 500),
        made(plan.GRADIENT, "slow", 9.0, 500),
        made(plan.GRADIENT, "tiny", 9.0, 50),
    ]
    table = {goal: out for goal, _, out in summary.judged([lean, fast, *peers])}
    met = {
        goal.split()[2].strip(","): out.startswith("met") for goal, out in table.items()
    }
    assert met == {"hungry": True, "frugal": False, "slow": True, "tiny": False}


def test_only_what_is_wrong_or_died_makes_a_run_fail():
    good = made(plan.VERIFY, "xla", None, None, passed=True) | {
        "section": "correctness"
    }
    slow = made(plan.GRADIENT, "xla", 9.0, 1, goal="faster", met=False)
    late = {k: x for k, x in good.items() if k != "passed"} | {"unfinished": "late"}
    assert summary.correct([good, slow, late], ["correctness"])
    assert not summary.correct([good | {"passed": False}], ["correctness"])
    died = {k: x for k, x in good.items() if k != "passed"} | {"error": "died"}
    assert not summary.correct([good, died], ["correctness"])
    assert not summary.correct([slow], ["correctness"])
    assert summary.correct([slow], ["speed"])
    assert "MISSED" in summary.report([good, slow])


def test_the_plot_has_every_line(tmp_path):
    found = [
        made(plan.GRADIENT, name, ms * V, 2**30 * V, setting, rehearsal=True) | {"V": V}
        for V in (128, 301)
        for name, ms, setting in (
            ("dpo_kernels mosaic_gpu", 1.0, "256 MiB"),
            ("dpo_kernels triton", 1.2, "256 MiB"),
            ("plain JAX, optax", 2.0, ""),
        )
    ]
    assert list(plot.lines(found)) == [
        "dpo_kernels mosaic_gpu",
        "dpo_kernels triton",
        "plain JAX, optax",
    ]
    assert plot.points(found[:1], "V", MAIN, "ms") == [(128, 128.0)]
    rows.write_to(tmp_path / "rows.json", found)
    assert plot.main([str(tmp_path / "rows.json"), str(tmp_path)]) == 0
    assert (tmp_path / plot.NAME).stat().st_size > 10_000
    rows.write_to(tmp_path / "rows.json", [])
    assert plot.main([str(tmp_path / "rows.json"), str(tmp_path)]) == 1
