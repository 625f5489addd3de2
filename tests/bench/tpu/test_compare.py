"""Our kernels as programs of `bench.tpu.schedule`, and their comparison."""

import jax
import jax.numpy as jnp
import pytest

from bench import rows
from bench.op.peers import log_softmax
from bench.tpu import compare as tpu_compare
from bench.tpu.bundles import ScheduleError
from bench.tpu.compile import Compiled, Job
from bench.tpu.programs import ProgramError, build
from dpo_kernels import token_logprobs
from dpo_kernels.pallas_tpu import logprobs as pallas_tpu
from dpo_kernels.verify.cases import bound
from dpo_kernels.verify.table import relative_error

T, D, V = SHAPE = (16, 128, 256)


def built(name: str, **options):
    return build(name, "v6e", SHAPE, "bfloat16", options)


def test_both_programs_are_the_op_s():
    """In the interpreter: what they compute, with what the forward leaves given.

    Errors are those that plain JAX's in the same dtype allow.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (T, D)).astype("bfloat16")
    head = jax.random.normal(keys[1], (V, D)).astype("bfloat16") / 11
    targets = jnp.arange(T, dtype=jnp.int32)
    dlogprob = jax.random.normal(keys[2], (T,))

    def op(hidden, head):
        given = {"num_valid": jnp.int32(T), "implementation": "pallas_tpu"}
        return token_logprobs(hidden, head, targets, **given).logprob

    @jax.jit
    def plain(hidden, head):
        logprob, pull = jax.vjp(lambda h, w: log_softmax(h, w, targets), hidden, head)
        return logprob, *pull(dlogprob)

    with pallas_tpu.interpreted():
        forward, backward = built("forward"), built("backward")
        # Not the op's own backward: it is what the program has to be.
        _, pull = jax.jit(lambda *x: jax.vjp(op, *x))(hidden, head)
        leaves, shapes = jax.tree.leaves(pull), backward.arguments[0]
        assert [x.shape for x in leaves] == [x.shape for x in shapes]
        run = jax.jit(forward.function)
        logprob = run(hidden, head, targets, jnp.int32(T)).logprob
        found = logprob, *jax.jit(backward.function)(leaves, dlogprob)
    truth = plain(hidden.astype("float32"), head.astype("float32"))
    allowed = [
        bound(relative_error(x, y), "bfloat16")
        for x, y in zip(plain(hidden, head), truth, strict=True)
    ]
    for ours, expected, most in zip(found, truth, allowed, strict=True):
        assert relative_error(ours, expected) <= most < 0.05


def test_useful_work_and_the_scalar_operand_are_those_of_the_valid_rows():
    with pallas_tpu.interpreted():
        for name, formula in (("forward", 2), ("backward", 6)):
            every, some = built(name), built(name, valid=4)
            assert (every.flops, some.flops) == (
                formula * T * D * V,
                formula * 4 * D * V,
            )
            assert (every.scalars, some.scalars) == ({0: [T]}, {0: [4]})
        assert built("forward").notes["config"]["block_t"] == T
        with pytest.raises(ProgramError, match=r"valid=17 is not in \[0, T=16\]"):
            built("forward", valid=17)
        with pytest.raises(ProgramError, match="forward takes no option 'block'"):
            built("forward", block=1)


def row(name: str, ms: float, **fields) -> rows.Row:
    device = "TPU v6e, ahead of time"
    about = {"implementation": name, "ms": ms, "device": device, "pct_peak": 90.0}
    return about | {"T": 8, "D": 2, "V": 3} | fields


def test_ratios_are_of_the_same_tpu_and_shape():
    table = tpu_compare.ratios(
        [
            row("forward", 2.0, valid=8),
            row("forward", 1.08, valid=4),
            row("backward", 4.0, valid=8),
            row("backward", 2.4, valid=4),
            row("tokamax", 3.0),
            row("tokamax", 99.0, device="TPU 7x, ahead of time"),
            row("tokamax-backward", 5.0),
        ]
    )
    _, _, forward, backward = table.splitlines()
    assert "| 1.50          | 0.540" in forward and "| yes" in forward
    assert "| 1.25          | 0.600" in backward and "| NO" in backward


def test_half_of_the_rows_is_the_same_program_told_otherwise(monkeypatch):
    compiled = Compiled(schedules={}, facts={"notes": {"config": {}}})
    told = []

    def follow(job, given, scalars):
        assert given is compiled
        told.append(scalars)
        both = {"tflops": 10.0, "pct_peak": 5.0, "matmul_flop_per_useful": 0.5}
        return row(job.program, 1.0, **both), []

    monkeypatch.setattr(tpu_compare, "compile_elsewhere", lambda *_: compiled)
    monkeypatch.setattr(tpu_compare, "follow", follow)
    job = Job(program="forward", generation="v6e", T=8, D=2, V=3)
    every, half = tpu_compare._ours(job)
    assert told == [{0: [8]}, {0: [4]}]
    assert (every["tflops"], half["tflops"], half["pct_peak"]) == (10.0, 5.0, 2.5)
    assert (half["valid"], half["matmul_flop_per_useful"]) == (4, 1.0)


def test_what_has_no_row_is_named_and_makes_the_command_fail(monkeypatch, capsys):
    def no_schedule(*_):
        raise ScheduleError("called in a loop of the program")

    monkeypatch.setattr(tpu_compare, "compile_elsewhere", no_schedule)
    monkeypatch.setattr(tpu_compare, "TPUS", ("v6e",))
    monkeypatch.setattr(rows, "read", lambda _: [])
    monkeypatch.setattr(rows, "write", None)  # --quick writes nothing
    monkeypatch.delenv("TOKAMAX_PYTHON", raising=False)
    assert tpu_compare.compare(quick=True) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        f"{name} v6e T=4096 D=4096 V=128256: called in a loop of the program"
        for name in ("forward", "backward")
    ]


def test_some_programs_leave_the_others_rows(monkeypatch, tmp_path):
    """Of one program on one TPU all rows are new, and no other row is touched."""

    def one(program: str, tpu: str, ms: float) -> rows.Row:
        shape = dict(zip("TDV", tpu_compare.SHAPES[0], strict=True))
        device = f"TPU {tpu}, predicted"
        return rows.row("", program, **shape, dtype="", device=device) | {
            "ms": ms,
            "pct_peak": 50.0,
        }

    old = [one("forward", "v6e", 1.0), one("forward", "7x", 1.0)]
    old += [one("backward", "v6e", 1.0), one("tokamax", "v6e", 1.0)]
    monkeypatch.setattr(tpu_compare, "SHAPES", tpu_compare.SHAPES[:1])
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setattr(
        tpu_compare, "_ours", lambda job: iter([one(job.program, job.generation, 2.0)])
    )
    monkeypatch.setattr(tpu_compare, "show", lambda _: "")
    monkeypatch.delenv("TOKAMAX_PYTHON", raising=False)
    rows.write(tpu_compare.NAME, old)
    assert tpu_compare.compare(False, ["v6e"], ["forward"]) == 0
    found = rows.read(tmp_path / f"{tpu_compare.NAME}.json")
    assert [row["ms"] for row in found] == [2.0, 1.0, 1.0, 1.0]
    assert [row["implementation"] for row in found[1:]] == [
        row["implementation"] for row in old[1:]
    ]
    with pytest.raises(ProgramError, match="tokamax is none of forward, backward"):
        tpu_compare.compare(False, [], ["tokamax"])
