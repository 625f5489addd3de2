"""`python -m bench.gpu --rehearse` and `bench.gpu.quick`, on the CPU at tiny shapes.

Sections run here one after the other, not in processes of their own, so that JAX is
imported once; what processes add is in `test_runs.py`.
"""

import importlib
import importlib.util
import json
import time
from concurrent.futures import Future

import jax
import numpy as np
import pytest

from bench import rows
from bench.device import plan, programs
from bench.gpu import __main__ as gpu
from bench.gpu import (
    attention,
    correctness,
    goals,
    quick,
    sanitizer,
    sizes,
    speed,
    supervisor,
)
from bench.gpu.pool import Pool
from bench.gpu.worker import SECTIONS, Context
from tests.bench.gpu.context import MAIN, TINY, context_at

OURS = "dpo_kernels xla"
# Of whole steps there is `bench.step`.
HERE = [name for name in sizes.BUDGETS if name != "step"]


def run_here(run, name, seconds):
    section = supervisor.Section(run=run, name=name, deadline=time.time() + seconds)
    context = Context(section.settings())
    importlib.import_module(SECTIONS[name]).run(context)
    section.listen()
    return section.late


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The exit code, and the rows of each section."""
    folder = tmp_path_factory.mktemp("rehearsal")
    find = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "REHEARSAL", TINY)
        patch.setattr(gpu, "run_section", run_here)
        patch.setattr(gpu, "probe", lambda run: "cpu")
        patch.setattr(gpu, "draw", lambda *_: None)
        patch.setattr(gpu.shared, "directory", lambda: folder)
        patch.setattr(sanitizer, "SHAPES", ((9, 8, 30, 5),))
        rows.commit()  # asks git, and remembers
        patch.setenv("PATH", "")  # no compute-sanitizer, no nvidia-smi
        patch.setattr(
            importlib.util, "find_spec", lambda x: None if x == "torch" else find(x)
        )
        code = gpu.main(["--rehearse", "--sections", ",".join(HERE)])
    found = rows.read(folder / "gpu.json")
    assert all(row["rehearsal"] for row in found)
    assert not list(folder.glob("*.npy")), "files of gigabytes are left behind"
    return code, {name: [x for x in found if x["section"] == name] for name in HERE}


def test_every_section_has_rows_and_none_an_error(rehearsed):
    code, found = rehearsed
    assert code == 0
    assert {name for name, some in found.items() if not some} == {"truth"}
    absent = {x["implementation"]: x["missing"] for x in found["speed"][:2]}
    assert set(absent) == {"dpo_kernels mosaic_gpu", "dpo_kernels triton"}
    assert all("NVIDIA GPU" in reason for reason in absent.values())
    assert not [row for some in found.values() for row in some if "error" in row]
    assert all(row["ms"] > 0 for row in found["sweep"]) and len(found["sweep"]) == 4
    for name in ("peers", "sweep_peers"):
        assert {x["missing"] for x in found[name]} == {"torch is not installed"}
    (checked,) = found["sanitizer"]
    assert checked["missing"] == "compute-sanitizer is not installed"


def test_speed_has_every_candidate_the_main_ones_first(rehearsed):
    timed = [row for row in rehearsed[1]["speed"] if "missing" not in row]
    first = [(row["op"], row["implementation"]) for row in timed[:3]]
    assert first == [(plan.MATMUL, "XLA"), (plan.FORWARD, OURS), (plan.GRADIENT, OURS)]
    found = {(r["op"], r["implementation"], r.get("setting")): r for r in timed}
    assert len(found) == len(timed) == 12
    assert found[plan.GRADIENT, OURS, "256 MiB"]["goal"] == goals.GRADIENT_GOAL.text
    product = found[plan.MATMUL, "XLA", ""]
    assert product["pct_peak"] == 100
    tflops = 2 * np.prod(MAIN, dtype=float) / product["ms"] / 1e9
    assert product["tflops"] == pytest.approx(tflops, rel=1e-3)
    for key, row in found.items():
        if key[0] in (plan.GRADIENT, plan.DPO) and speed.HALF not in key:
            assert 1e-4 < row["gradient_error"] < 1e-2, key
        assert row["pct_peak"] or row["op"] == "half the rows over all"
    assert found["half the rows over all", OURS, ""]["goal"]
    assert {key[1] for key in found} >= {"plain JAX, token chunks", "plain JAX, optax"}


def test_the_main_shape_is_timed_before_anything_else_is_compiled(
    tmp_path, monkeypatch
):
    """And so on: a task's rows do not wait for the next one's programs."""
    log = []

    def compile(pool, candidates):
        log.append([(one.subject.T, one.subject.op) for one in candidates])
        return {one.subject: None for one in todo[main](programs.abstract)}

    def timed(*_):
        log.append("timed")
        return {}

    monkeypatch.setattr(Pool, "compile", compile)
    monkeypatch.setattr(speed, "measure", timed)
    context = context_at(tmp_path, sizes=sizes.REHEARSAL)
    todo = speed.tasks(context)
    main = next(iter(todo))
    speed.run(context)
    assert log[0] == [
        (MAIN[0], op) for op in (plan.MATMUL, plan.FORWARD, plan.GRADIENT)
    ]
    assert log[1::2] == ["timed"] * 4 and "timed" not in log[::2]
    assert [programs[0] for programs in log[::2]] == [
        (T, plan.MATMUL) for T in (MAIN[0], MAIN[0], 16, 48)
    ]


def test_correctness_of_real_cases_sums_and_small_ones(rehearsed):
    found = rehearsed[1]["correctness"]
    assert [row["op"] for row in found].count("sequence_sums") == 1
    assert all(row["passed"] for row in found)
    assert all(row["gradient_error"] > 0 for row in found if row["op"] == plan.VERIFY)
    real = [row for row in found if row.get("runs")]
    assert [(x["setting"], x["same_bits"]) for x in real] == [("all, 1 MiB", TINY.runs)]
    assert {row["setting"] for row in found[2:]} == {"plain", "all"}


def test_one_option_at_a_time_is_checked_before_all_at_once():
    names = [one.case.name for one in correctness.cases(rehearse=False)]
    assert names[:2] == ["plain", "bias"]
    assert names.index("all") > max(map(names.index, ("bias", "softcap")))


def test_quick_has_five_kinds_of_rows_each_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sizes, "REHEARSAL", TINY)
    output, seen = tmp_path / "quick.jsonl", []
    line = quick.summary.line

    def written(row):
        seen.append(len(output.read_text().splitlines()))
        return line(row)

    monkeypatch.setattr(quick.summary, "line", written)
    assert quick.main(["--rehearse", "--output", str(output)]) == 0
    found = [json.loads(text) for text in output.read_text().splitlines()]
    ops = (plan.MATMUL, plan.FORWARD, plan.GRADIENT, plan.GRADIENT)
    assert [row["op"] for row in found] == [*ops, plan.VERIFY, plan.VERIFY]
    names = ["XLA", OURS, OURS, quick.PEER, OURS, quick.PEER]
    assert [row["implementation"] for row in found] == names
    assert all(row["pct_peak"] > 0 for row in found[:4])
    assert all(row["passed"] for row in found[4:])
    assert seen == [1, 2, 3, 4, 5, 6]
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_quick_fails_where_a_gradient_is_wrong(tmp_path):
    run = quick.Run(TINY, tmp_path / "rows")
    call = programs.gradient(programs.peer(quick.PEERS[quick.PEER]))
    right = quick.compiled(call, run.x)

    def wrong(x):
        logprob, (dhidden, dhead) = right(x)
        return logprob, (dhidden, dhead.at[-1].multiply(2))

    assert run.check({"same": right, quick.PEER: right})
    assert not run.check({"wrong": wrong, quick.PEER: right})


def test_quick_says_in_one_line_that_there_is_no_gpu(monkeypatch, capsys):
    def none():
        raise RuntimeError("Unknown backend cuda")

    monkeypatch.setattr(quick.jax, "devices", none)
    monkeypatch.setattr(quick.jax.config, "update", lambda *_: None)
    assert quick.main([]) == 2
    out = capsys.readouterr().out
    assert out.startswith("no GPU that JAX can use") and out.count("\n") == 1


def test_what_is_compiled_for_one_candidate_serves_its_like(tmp_path, monkeypatch):
    """Nothing is compiled: a future that is done stands for each program."""
    context, compiled = context_at(tmp_path), []

    def submit(call, *shapes):
        compiled.append(call)
        future = Future()
        future.set_result(object())
        return future

    pool = Pool(context)
    monkeypatch.setattr(pool._use, "submit", submit)
    tasks = speed.tasks(context).values()
    main, more = [list(task(programs.abstract)) for task in tasks]
    pool.compile(main)
    assert len(compiled) == len(main) == 3
    found = pool.compile(more)
    assert set(found) == {one.subject for one in more}
    # The bare product is there already, and half the rows are all rows' program.
    assert len(compiled) == len(set(compiled)) == len(main) + len(more) - 2
    halves = [found[one.subject] for one in more if "num_valid" in one.subject.setting]
    assert len(halves) == 2 and halves[0] is halves[1]
    assert main[0].subject == more[0].subject and more[0].subject in found


def test_attention_has_a_row_for_each_form_and_operation(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "REHEARSAL", TINY)
    output = tmp_path / "attention.jsonl"
    assert attention.main(["--rehearse", "--output", str(output)]) == 0
    found = [json.loads(text) for text in output.read_text().splitlines()]
    assert [(row["form"], row["op"]) for row in found] == [
        (form, op) for form in ("padded", "packed") for op in attention.OPS
    ]
    assert {row["implementation"] for row in found} == {"tiles"}
    assert all(row["ms"] > 0 and 0 < row["relative_error"] < 0.02 for row in found)


def test_attention_fails_where_one_is_wrong_and_says_what_does_not_run(monkeypatch):
    form, given = attention.REHEARSAL[1], []
    sound = attention.implementations(form)["tiles"]

    def broken(*_):
        raise NotImplementedError("heads of 16")

    # Looks at other sequences' keys.
    wrong = attention.implementations(attention.REHEARSAL[0])["tiles"]
    for other in wrong, broken:
        found = {"tiles": sound, "other": other}
        monkeypatch.setattr(attention, "implementations", lambda _, x=found: x)
        assert not attention.measure(form, TINY, given.append)
        monkeypatch.undo()
    assert [row["implementation"] for row in given[:4]] == ["tiles"] * 2 + ["other"] * 2
    assert given[2]["relative_error"] > 0.1 > given[0]["relative_error"]
    assert given[6]["error"] == "NotImplementedError: heads of 16"
    assert given[6]["ms"] is None and given[4]["ms"] > 0


def test_attention_without_gradients_is_a_row_that_says_so(monkeypatch):
    """Whatever the number of rows, which the result has as many parts as."""
    form, given = attention.Form("padded", 4, 96, heads=(4, 2, 16)), []
    sound = attention.implementations(form)["tiles"]

    def forward_only(query, key, value):
        return jax.lax.while_loop(
            lambda carry: carry[0] < 1,
            lambda carry: (carry[0] + 1, sound(query, key, value)),
            (0, query),
        )[1]

    found = {"tiles": sound, "other": forward_only}
    monkeypatch.setattr(attention, "implementations", lambda _: found)
    assert not attention.measure(form, TINY, given.append)
    assert [row["ms"] is None for row in given] == [False, False, False, True]
    assert given[2]["relative_error"] is None and given[3]["error"]
