"""How often what is inside XLA's loops runs."""

import pytest

from bench.tpu.bundles import ScheduleError
from bench.tpu.model import calls
from bench.tpu.trips import estimated_cycles, trips

# A loop from 3 to 17 in steps of 2 around one of 5 turns, and one of unknown length.
HLO = """
%inner_body (a: (s32[])) -> (s32[]) {
  %one.1 = s32[] constant(1)
  %x.1 = (s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%x.1), index=0
  %kernel.1 = f32[8] custom-call(), custom_call_target="tpu_custom_call"
  %next.1 = s32[] add(%i.1, %one.1)
  ROOT %t.1 = (s32[]) tuple(%next.1)
}

%inner_test (a: (s32[])) -> pred[] {
  %stop.1 = s32[] constant(5)
  %x.2 = (s32[]) parameter(0)
  %i.2 = s32[] get-tuple-element(%x.2), index=0
  ROOT %lt.1 = pred[] compare(%i.2, %stop.1), direction=LT
}

%turn (a: (f32[8], s32[])) -> (f32[8], s32[]) {
  %two.3 = s32[] constant(2)
  %zero.3 = s32[] constant(0)
  %x.3 = (f32[8], s32[]) parameter(0)
  %f.3 = f32[8] get-tuple-element(%x.3), index=0
  %i.3 = s32[] get-tuple-element(%x.3), index=1
  %start.3 = (s32[]) tuple(%zero.3)
  %while.3 = (s32[]) while(%start.3), condition=%inner_test, body=%inner_body
  %step.3 = s32[] copy(%two.3)
  %kernel.3 = f32[8] custom-call(), custom_call_target="tpu_custom_call"
  %next.3 = s32[] add(%i.3, %step.3)
  ROOT %t.3 = (f32[8], s32[]) tuple(%f.3, %next.3)
}

%test (a: (f32[8], s32[])) -> pred[] {
  %stop.4 = s32[] constant(17)
  %x.4 = (f32[8], s32[]) parameter(0)
  %i.4 = s32[] get-tuple-element(%x.4), index=1
  ROOT %lt.4 = pred[] compare(%i.4, %stop.4), direction=LT
}

ENTRY %main (f: f32[8]) -> (f32[8], s32[]) {
  %f.5 = f32[8] parameter(0)
  %three.5 = s32[] constant(3)
  %copy.5 = s32[] copy(%three.5)
  %start.5 = (f32[8], s32[]) tuple(%f.5, %copy.5)
  %kernel.5 = f32[8] custom-call(), custom_call_target="tpu_custom_call"
  ROOT %while.5 = (f32[8], s32[]) while(%start.5), condition=%test, body=%turn
}
"""


def test_loops_multiply():
    found = trips(HLO)
    assert (found["kernel.3"], found["kernel.1"]) == (7, 35)
    assert "kernel.5" not in found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("%three.5 = s32[] constant(3)", "%three.5 = s32[] parameter(1)"),
        ("%stop.4 = s32[] constant(17)", "%stop.4 = s32[] parameter(1)"),
        (
            "compare(%i.4, %stop.4), direction=LT",
            "compare(%i.4, %stop.4), direction=NE",
        ),
        ("%two.3 = s32[] constant(2)", "%two.3 = s32[] parameter(1)"),
    ],
)
def test_a_loop_whose_length_is_not_constant_is_left_out(old, new):
    assert old in HLO
    assert trips(HLO.replace(old, new)) == {}


def test_what_is_in_such_a_loop_runs_as_often_as_is_said():
    unknown = HLO.replace("%stop.1 = s32[] constant(5)", "%stop.1 = s32[] parameter(1)")
    found = trips(unknown, 42)
    assert (found["kernel.3"], found["kernel.1"]) == (7, 42)


def test_what_xla_expects_of_operations():
    config = ', backend_config={"estimated_cycles":"123","x":{}}'
    text = HLO.replace("%two.3)\n", f"%two.3){config}\n")
    assert estimated_cycles(text) == {"step.3": 123}
    unknown = text.replace('"123"', f'"{2**63 - 1}"')
    assert estimated_cycles(unknown) == {}
    assert estimated_cycles(HLO) == {}


def test_calls_in_loops_count_as_often_as_they_run():
    program = "  0x1 : { %1 = inlined_call %s1 /* %a.1 = custom-call() */ }\n"
    program += "  0x2 : > { %2 = inlined_call %s1 /* %b.1 = fusion() */ }\n"
    assert calls(program, {"b.1": 7}) == {"a.1": 1, "b.1": 7}
    with pytest.raises(ScheduleError, match="b.1 is called in a loop of the program"):
        calls(program, {"a.1": 7})
