"""The instrument that predicts a TPU kernel's speed from its schedule.

Nothing here compiles for a TPU: the schedule is a text, that of a kernel of ours which
copies blocks in a loop whose length a scalar operand holds.
"""

import re
from pathlib import Path

import pytest

from bench.tpu import bundles as tpu_bundles
from bench.tpu import compile as tpu_compile
from bench.tpu import delays as tpu_delays
from bench.tpu import programs as tpu_programs
from bench.tpu import schedule as tpu_schedule
from bench.tpu.blocks import Core, Run
from bench.tpu.bundles import ScheduleError, parse
from bench.tpu.chips import CHIPS
from bench.tpu.model import calls, operations
from bench.tpu.programs import Program, ProgramError
from bench.tpu.simulator import Simulator
from bench.tpu.transfers import Memory

# What the TPU compiler (libtpu 0.0.48.1) makes for v6e of
#     for i in range(n[0]): copy x[8 i : 8 i + 8] to buf, wait; o += buf
# with comments cut out.
COPIES = (Path(__file__).parents[2] / "fixtures" / "tpu_copies.txt").read_text()
CORE = Core(
    memory=Memory(bytes_per_cycle=64, latency=10), row_cycles=0.5, delay_slots=4
)
TRANSFER = 128 * 32 / 64 + 10  # cycles from its start to its end


def run(text: str, *values: int) -> Run:
    scalars = {0: list(values)} if values else {}
    return Simulator(parse(text, "f"), CORE, scalars=scalars).simulate()


def without(address: str) -> str:
    """The kernel with one bundle emptied."""
    return re.sub(rf"(?m)^( *{address} +(?:LB|PF)?: *>?) .*$", r"\1 {}", COPIES)


def test_the_text_is_read():
    schedule = parse(COPIES, "f")
    assert len(schedule.bundles) == 0x1E
    assert schedule.regions == {1: 0, 32: 8, 6: 0xC, 26: 0x14}
    loop = schedule.bundles[0xC]
    assert (loop.label, loop.depth, loop.slots["vld"]) == ("", 1, 2)
    assert schedule.bundles[8].label == "LB"
    assert schedule.bundles[0xD].slots == {"valu": 1}
    assert [one.opcode for one in schedule.bundles[0xA].scalar] == ["dma.hbm_to_vmem"]


@pytest.mark.parametrize("times", [1, 3, 50])
def test_a_loop_runs_as_often_as_its_scalar_says(times):
    result = run(COPIES, times)
    assert result.read_bytes == times * 4096
    assert result.written_bytes == 4096
    assert result.transfers == times + 1
    # 8 bundles before; 12 an iteration, of which the one after the transfer's waits for
    # the rest of it; 10 after, and the same wait once.
    assert result.cycles == 8 + times * (12 + TRANSFER - 1) + 10 + TRANSFER - 1
    assert result.wait == (times + 1) * (TRANSFER - 1)
    (loop,) = [b for b in result.blocks if b.start == 8]
    assert (loop.visits, loop.stop, loop.wait) == (times, 0x14, times * (TRANSFER - 1))


def test_a_loop_that_is_skipped_costs_its_branch_only():
    result = run(COPIES, 0)
    assert result.read_bytes == 0
    assert result.cycles == 8 + 10 + TRANSFER - 1
    assert [b.visits for b in result.blocks if b.start == 8] == [0]


def test_a_branch_to_the_end_of_the_kernel():
    """The region that it goes to is then named nowhere."""
    text = "0 : { %1 = sbr.rel target = $region9 }\n"
    text += "".join(f"{i:#x} : {{}}\n" for i in range(1, 20)) + "0x14 PF: {}\n"
    assert run(text).cycles == 1 + 4 + 1


def test_control_flow_that_depends_on_data_is_an_error():
    with pytest.raises(ScheduleError, match="0x3: .* is not known; it depends on data"):
        run(COPIES)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("0xa", "a wait for a transfer that nobody started"),
        ("0x18", "transfers that nobody waited for"),
        ("0x17", "transfers that nobody waited for"),
    ],
)
def test_transfers_and_waits_have_to_match(address, message):
    assert without(address) != COPIES
    with pytest.raises(ScheduleError, match=message):
        run(without(address), 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no bundles"),
        ("nothing of the kind\n", "no bundles"),
        ("0 : {}\n0x2 : {}\n", "bundle 0x1 is missing"),
        ("0 : { %1 = vmatmul.c64.mxu0 %v1_v2 }", "unknown element type"),
        ("0 : { ??? }", "cannot read"),
    ],
)
def test_text_that_cannot_be_read(text, message):
    with pytest.raises(ScheduleError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 : { %1 = sbr.rel target = $region9 }", "no target"),
        ("0 : { %1 = sst [smem:[#allocation1]] what }", "cannot read the operand"),
        ("0 : { %1 = dma.strange 1, 2 }", "bundle 0x0"),
        (
            "0 LB: > { %1 = sbr.rel target = $region5 } /* Start region 5 */\n"
            + "".join(f"{i:#x} : {{}}\n" for i in range(1, 6)),
            "does not end",
        ),
    ],
)
def test_instructions_that_cannot_be_followed(text, message, monkeypatch):
    monkeypatch.setattr("bench.tpu.simulator.MAX_BUNDLES", 100)
    with pytest.raises(ScheduleError, match=message):
        Simulator(parse(text, "f"), CORE).simulate()


def scalars(body: str) -> dict:
    """Registers after these bundles; a store keeps what it stores alive."""
    bodies = body.strip().splitlines()
    text = "".join(f"{i:#x} : {{ {x.strip()} }}\n" for i, x in enumerate(bodies))
    simulator = Simulator(parse(text, "f"), CORE)
    simulator.simulate()
    return simulator.smem


def test_arithmetic_is_of_32_bits():
    """-1 is written 4294967295, and an unsigned comparison takes it as that."""
    smem = scalars(
        """
        %s1_s0 = smov 0
        %s2_s1 = sadd.s32 4294967295, %s1_s0
        %p3_p0 = scmp.eq.s32.totalorder %s2_s1, 4294967295 ;; \
            %p4_p1 = scmp.lt.s32.totalorder %s2_s1, 0 ;; \
            %p5_p2 = scmp.lt.u32.totalorder %s2_s1, 5
        %s6_s2 = scalar_select /*predicate=*/%p3_p0, /*on_true=*/7, /*on_false=*/8
        %s7_s3 = scalar_select /*predicate=*/%p4_p1, /*on_true=*/7, /*on_false=*/8
        %s8_s4 = scalar_select /*predicate=*/%p5_p2, /*on_true=*/7, /*on_false=*/8
        %s9_s2 = smov (%p5_p2, %s6_s2), 9
        %10 = sst [smem:[#allocation1]] %s9_s2
        %11 = sst [smem:[#allocation1 + $0x1]] %s7_s3
        %12 = sst [smem:[#allocation1 + $0x2]] %s8_s4
        %13 = sst [smem:[#allocation1 + $0x3]] (%p5_p2), %s8_s4
        """
    )
    assert list(smem.values()) == [7, 7, 8]


def test_a_bundle_reads_before_it_writes():
    smem = scalars(
        """
        %s1_s0 = smov 3 ;; %s2_s1 = smov 4
        %s3_s1 = smov %s1_s0 ;; %s4_s0 = smov %s2_s1
        %5 = sst [smem:[#allocation1]] %s3_s1 ;; %6 = sst [smem:[#allocation2]] %s4_s0
        """
    )
    assert list(smem.values()) == [3, 4]


def test_a_region_is_no_faster_than_the_matrix_unit():
    """Four bundles feed 2 x 16 rows of bfloat16 and 8 of float32; a row takes 0.5."""
    opcodes = ["vmatmul.mubr.bf16.gmra.mxu0"] * 2 + ["vmatmul.f32.gmra.mxu1"]
    text = "".join(f"{i:#x} : {{ %{i} = {x} %v1_v2 }}\n" for i, x in enumerate(opcodes))
    result = run(text + "0x3 : {}\n")
    (block,) = result.blocks
    assert block.matmul_rows == 40
    assert (block.stall, result.cycles) == (16, 20)


def table(*lines: str) -> str:
    names = "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
    return f"== CAPACITY:\n{names}\n== UTILIZATION:\n" + "\n".join(lines) + "\n"


ROW_A, ROW_B, NONE = ("0 0 1 0 0 2 0 0 0 1", "0 0 4 0 0 0 0 1 0 0", "0 0 " + "0 " * 8)
MATRIX = "1 0 " + "0 " * 8


def test_delays_are_what_the_last_step_folds_away():
    before = table(ROW_A, NONE, NONE, ROW_B, MATRIX, MATRIX, ROW_A, NONE)
    after = table(ROW_A, NONE, ROW_B, MATRIX, ROW_A)
    empty = [False, True, False, False, False]
    assert tpu_delays.cycles_of_bundles(before, after, empty) == [1, 2, 1, 2, 2]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("nothing", table(ROW_A), "no table"),
        (table("x"), table(ROW_A), "invalid literal"),
        (table(ROW_A), table(ROW_A, ROW_B), "2 lines of utilization for 1 bundles"),
        (table(*[ROW_A] * 200), table(ROW_B), "do not match"),
    ],
)
def test_tables_of_utilization_that_do_not_fit(before, after, message):
    with pytest.raises(ScheduleError, match=message):
        tpu_delays.cycles_of_bundles(before, after, [False])


def test_operations_of_a_program():
    """The top level says how often each is called; without a kernel there is no row."""
    top = "   0x1 : { %50 = inlined_call %s1_s0 /* %f.1 = custom-call(%x.2) */ }\n"
    dumps = {
        "TLP": tpu_compile.Dump(bundles=top * 2),
        "f.1": tpu_compile.Dump(bundles=COPIES),
    }
    (one,), skipped = operations(dumps, CHIPS["v6e"], {0: [5]})
    assert (one.name, one.pallas, one.calls, skipped) == ("f.1", True, 2, {})
    assert (one.steps, one.hbm_bytes, one.matmul_flop) == (5, 6 * 4096, 0)
    assert one.binds == "waits"  # 4 KiB take 4 cycles, and arrive after a microsecond
    with pytest.raises(ScheduleError, match="no Pallas kernel"):
        operations({"TLP": tpu_compile.Dump(bundles=top)}, CHIPS["v6e"])
    with pytest.raises(ScheduleError, match=r"f\.1 is called in a loop"):
        calls(top.replace(":", ": >", 1))


def test_what_cannot_be_followed_is_left_out_unless_it_multiplies():
    def program(bundles: str) -> dict[str, tpu_compile.Dump]:
        top = "".join(
            f"   0x{i} : {{ %5{i} = inlined_call %s1 /* %{name} = {kind}() */ }}\n"
            for i, (name, kind) in enumerate((("f.1", "custom-call"), ("g", "fusion")))
        )
        entry = "/* entry bundle: %g = fusion(%x) */\n"
        texts = {"TLP": top, "f.1": COPIES, "g": entry + bundles}
        return {name: tpu_compile.Dump(bundles=text) for name, text in texts.items()}

    odd = "0 : { %1 = dma.odd [hbm:%s1] }\n"
    done, skipped = operations(program(odd), CHIPS["v6e"], {0: [5]})
    assert [one.name for one in done] == ["f.1"] and list(skipped) == ["g"]
    product = odd + "0x1 : { %2 = vmatmul.mubr.bf16.gmra.mxu0 %v1 }\n"
    with pytest.raises(ScheduleError, match="^g, bundle 0"):
        operations(program(product), CHIPS["v6e"], {0: [5]})


@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e"])
def test_the_clock_gives_the_peak(name):
    chip = CHIPS[name]
    tflops = chip.hertz * chip.flop_per_cycle * chip.cores / 1e12
    assert tflops == pytest.approx(chip.peak_tflops, rel=0.001)


def test_slots():
    slots = ["vmatmul.mubr.bf16", "vmatpush1.bf16", "vpow2.f32", "vst", "vstv", "sadd"]
    found = [tpu_bundles.slot(opcode) for opcode in slots]
    assert found == ["vmatmul", "vmatpush", "eup", "vst", "valu", ""]


def test_options_are_swept_over():
    sets = tpu_schedule.option_sets(["a=1,2", "b=x", "c=[2,3]"])
    assert sets == [{"a": a, "b": "x", "c": [2, 3]} for a in (1, 2)]
    assert tpu_schedule.option_sets([]) == [{}]
    assert tpu_schedule.scalar_values(["0=5", "2=1,2"]) == {0: [5], 2: [1, 2]}


def test_programs_by_name_and_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def build(generation, T, D, V, dtype, options):\n"
        "    a = options.pop('a', 1)\n"
        "    return (lambda x: x), [(generation, T, D, V, dtype, a)]\n"
    )
    program = tpu_programs.build(f"{file}:build", "v6e", (1, 2, 3), "f", {"a": 5})
    assert isinstance(program, Program)
    assert program.arguments == [("v6e", 1, 2, 3, "f", 5)]
    for name, options, message in (
        (f"{file}:build", {"b": 1}, "takes no option 'b'"),
        (f"{file}:other", {}, "has no other"),
        ("/nowhere.py:build", {}, "no file /nowhere.py"),
        ("unheard-of", {}, "no program 'unheard-of'; one of forward"),
    ):
        with pytest.raises(ProgramError, match=message):
            tpu_programs.build(name, "v6e", (1, 2, 3), "f", options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tpu", "v6e"], "say --program --T --D --V"),
        (["--program", "tokamax", "--tpu", "v6e"], "say --T --D --V"),
        (["--reproduce"], "set TOKAMAX_PYTHON to the Python of"),
        (
            "--program tokamax --tpu v6e --T 8 --D 8 --V 8".split(),
            "tokamax needs tokamax: set TOKAMAX_PYTHON",
        ),
        (
            "--program x --tpu v6e --T 8 --D 8 --V 8 --option a".split(),
            "--option 'a' is not name=value",
        ),
        (
            "--program x --tpu v6e --T 8 --D 8 --V 8 --scalar a=b".split(),
            "is not operand=int",
        ),
    ],
)
def test_bad_input_is_one_line_and_2(words, message, capsys, monkeypatch):
    monkeypatch.delenv("TOKAMAX_PYTHON", raising=False)
    assert tpu_schedule.main(words) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error
