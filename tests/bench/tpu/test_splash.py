"""Splash attention's kernels and plain tiles as programs of `bench.tpu.schedule`."""

from pathlib import Path

import numpy as np
import pytest

from bench import rows
from bench.tpu import splash, splash_blocks, tiles
from bench.tpu.chips import CHIPS
from bench.tpu.compile import Compiled, Dump, Job
from bench.tpu.programs import ProgramError, build

COPIES = (Path(__file__).parents[2] / "fixtures" / "tpu_copies.txt").read_text()
S, D = 1024, 4096


def built(name: str, **options):
    return build(f"splash-{name}", "v6e", (S, D, 1), "bfloat16", options)


def test_a_word_of_scalar_memory_holds_a_column_of_four_rows():
    array = np.arange(1, 16, dtype=np.int8).reshape(1, 5, 3)
    array[0, 3, 1] = -1
    words = splash.packed(array)
    assert len(words) == 2 * 128  # five rows are two times four
    assert words[0] == 1 | 4 << 8 | 7 << 16 | 10 << 24
    assert words[1] & 0xFFFFFFFF == 2 | 5 << 8 | 8 << 16 | 0xFF << 24
    assert (words[2], words[3], words[127]) == (3 | 6 << 8 | 9 << 16 | 12 << 24, 0, 0)
    assert words[128:132] == [13, 14, 15, 0]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((1, 4, 4), np.int16),
        np.zeros((2, 4, 4), np.int8),
        np.zeros((1, 4, 129), np.int8),
    ],
)
def test_what_lies_in_scalar_memory_otherwise_is_refused(array):
    with pytest.raises(ProgramError, match=r"no layout is known of int"):
        splash.packed(array)


def test_pairs_are_those_that_see_each_other():
    query, key = np.mgrid[:9, :9]
    for reach in (1, 4, 9):
        seen = (key <= query) & (query - key < reach)
        assert splash.pairs(9, reach) == seen.sum()


def test_blocks_that_run_are_those_with_a_key_in_sight():
    """Of squares of 256: four rows and columns, ten at or below the diagonal."""
    for which, products in splash.PRODUCTS.items():
        square = {"q": 256, "kv": 256} | ({} if which == "dq" else {"compute": 256})
        program = built(which, **square)
        notes = program.notes
        assert (notes["grid_blocks"], notes["blocks_run"]) == (16, 10)
        assert program.flops == products * 2 * D * S * (S + 1) // 2
        mask = np.array(program.scalars[splash.BLOCK_MASK], "<i4").view(np.uint8)
        run = (mask.reshape(128, 4)[:4] > 0).T
        want = np.tril(np.ones((4, 4), bool))
        # Of each block of keys those of queries that run come first.
        assert ((run[::-1] if which == "dkv" else run) == want).all()
    near = built("forward", q=256, kv=256, compute=256, window=256)
    assert near.notes["blocks_run"] == 7
    assert near.flops == 4 * D * splash.pairs(S, 256)


def test_the_whole_of_attend_takes_what_the_models_have():
    (query, key, _) = built("forward", whole=1).arguments
    assert (query.shape, key.shape) == ((1, S, 32, 128), (1, S, 8, 128))
    (query, key, _) = built("forward").arguments
    assert (query.shape, key.shape) == ((1, 8, 4, S, 128), (1, 8, S, 128))


def test_blocks_are_the_engine_s_unless_given():
    own = splash.sizes("forward", S, S, {})
    given = splash.sizes("forward", S, S, {"q": 128, "layout": "seq"})
    assert (given.block_q, given.block_kv) == (128, own.block_kv)
    assert given.k_layout.name == "SEQ_MINOR" != own.k_layout.name
    fused = splash.sizes("fused", S, S, {"kv": 256, "compute": 128})
    assert (fused.use_fused_bwd_kernel, fused.block_q_dq) == (True, None)
    assert (fused.block_kv_dkv, fused.block_kv_dkv_compute) == (256, 128)
    with pytest.raises(ProgramError, match="layout='x' is neither"):
        splash.sizes("forward", S, S, {"layout": "x"})
    with pytest.raises(ProgramError, match="'compute'"):
        built("dq", compute=128)
    with pytest.raises(ProgramError, match="D=4096 is not a number"):
        built("dq", K=3)


def test_tiles_of_keys_are_those_up_to_the_queries_own():
    assert tiles.turns(2048, 128) == 136
    program = build("tiles-backward", "v6e", (300, D, 1), "bfloat16", {})
    assert program.unknown_loop_runs == 6
    assert program.flops == 5 * 2 * D * 300 * 301 // 2


def test_tiles_take_their_operations_cycles_as_often_as_these_run():
    """f is followed, g is not, and has XLA's estimate in its place."""
    top = "   0x1 : > { %50 = inlined_call %s1 /* %f = copy(%x) */ }\n"
    top += "   0x2 : { %51 = inlined_call %s1 /* %g = fusion(%x) */ }\n"
    follow = "/* entry bundle: %f = copy(%x) */\n"
    texts = {
        "TLP": top,
        "f": follow + "0x0 : {}\n0x1 : {}\n",
        "g": "/* entry bundle: %g = fusion(%x) */\n0 : { %1 = dma.odd 1 }\n",
    }
    facts = {
        "trips": {"f": 10},
        "estimated_cycles": {"f": 100, "g": 700},
        "flops": 1,
        "compiler": "",
        "temp_bytes": 0,
    }
    compiled = Compiled(
        schedules={k: Dump(bundles=v) for k, v in texts.items()}, facts=facts
    )
    job = Job(program="tiles-forward", generation="v6e", T=8, D=2, V=1)
    row = tiles.follow(job, compiled)
    cycle_ms = 1e3 / CHIPS["v6e"].hertz
    assert row["ms"] == pytest.approx((10 * 2 + 700) * cycle_ms, rel=1e-3)
    assert row["estimate_ms"] == round((10 * 100 + 700) * cycle_ms, 4)
    assert row["operations"] == 11 and list(row["not_timed"]) == ["g"]


# The sweep ----------------------------------------------------------------------------


def row(program: str, ms: float | None, T: int = 2048, **options) -> rows.Row:
    device = "TPU v6e, ahead of time"
    return {
        "device": device,
        "T": T,
        "implementation": program,
        "options": options,
        "ms": ms,
        "kernel_ms": ms,
    }


def test_the_longer_length_has_what_was_near_the_best_of_the_shorter():
    results = [
        row("splash-dq", 1.0, q=1024, kv=2048),
        row("splash-dq", 1.1, q=2048, kv=2048),
        row("splash-dq", 1.3, q=2048, kv=512),
        row("splash-dq", None, q=2048, kv=1024),
        row("splash-dkv", 0.1, q=2048, kv=512, compute=512),
    ]
    found = splash_blocks.shortlist(results, "dq", 8192)
    own = splash_blocks.own("dq", 8192)
    assert set(found) == {(1024, 2048), (2048, 2048), (512, 512), own}
    first = splash_blocks.shortlist([], "dq", 2048)
    assert {*splash_blocks.candidates("dq"), own} == set(first)


def test_what_was_not_followed_counts_by_xla_s_estimate():
    assert splash_blocks.total(row("splash-dq", 1.0) | {"not_timed_ms": 0.5}) == 1.5


def test_tables_have_the_best_and_the_engine_s():
    own = dict(zip(("q", "kv"), splash_blocks.own("dq", 2048), strict=True))
    results = [
        row("splash-dq", 2.0, q=512, kv=512),
        row("splash-dq", 1.25, **own),
        row("splash-dq", 1.0, q=2048, kv=256),
    ]
    (line,) = splash_blocks.show_kernels(results).splitlines()[2:]
    cells = [x.strip() for x in line.split("|")]
    assert cells[4:7] == ["2", "2048/256", "1"]
    assert cells[7:10] == ["/".join(map(str, own.values())), "1.25", "25%"]
    results += [row(f"splash-{x}", 1.0, whole=1) for x in ("forward", "dq", "dkv")]
    for phase in ("forward", "backward"):
        results.append(row(f"tiles-{phase}", 3.0) | {"estimate_ms": 6.0})
    forward, backward = splash_blocks.show_attention(results).splitlines()[2:]
    assert "3.0 to 6.0" in forward and "1.5 to 3.0" in backward


def test_a_candidate_that_does_not_compile_is_a_row(monkeypatch, tmp_path, capsys):
    def refused(job):
        raise ProgramError("out of memory")

    own = splash_blocks.own("dq", 2048)
    monkeypatch.setattr(splash_blocks, "predict", refused)
    monkeypatch.setattr(splash_blocks, "KERNELS", ("dq",))
    monkeypatch.setattr(splash_blocks, "LENGTHS", (2048,))
    monkeypatch.setattr(splash_blocks, "shortlist", lambda *_: [(8, 8), own])
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    assert splash_blocks.main(["--tpu", "v6e", "--part", "kernels"]) == 1
    found = rows.read(tmp_path / "splash_blocks.json")
    assert [splash_blocks.blocks_of(x) for x in found] == [(8, 8), own]
    assert {x["error"] for x in found} == {"out of memory"}
    monkeypatch.setattr(splash_blocks, "shortlist", lambda *_: [(8, 8)])
    assert splash_blocks.main(["--tpu", "v6e", "--part", "kernels"]) == 0
    assert "out of memory" in capsys.readouterr().out
