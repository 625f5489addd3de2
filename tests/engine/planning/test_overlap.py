"""Which exchanges run beside computation, in texts as compilers write them."""

import pytest

from engine.planning.hlo import parse
from engine.planning.traffic import traffic_of

MESH = {"data": 1, "fsdp": 4, "tensor": 1}
GROUPS = "channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}"
PRODUCT = "f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%product"
SINE = "f32[8,8]{1,0} fusion(%x), kind=kLoop, calls=%sine"
KERNEL = 'f32[8,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"'
BUFFER = 'f32[8,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"'

STARTED = """\
  %start = (f32[2,8], f32[8,8]) all-gather-start(%part), {groups}
{between}
  %whole = f32[8,8]{{1,0}} all-gather-done(%start)
"""
ON_SPARSE_CORE = """\
  %start = ((), (), s32[]{{:S(2)}}) call-start(), to_apply=%gather
{before}
  %update = ((f32[2,8]), f32[8,8]) call-update(%start, %part)
{between}
  %whole = f32[8,8]{{1,0}} call-done(%update)
"""
MODULE = """\
HloModule jit_step, is_scheduled=true

%product (a: f32[8,8]) -> f32[8,8] {{
  %a = f32[8,8]{{1,0}} parameter(0)
  ROOT %dot = f32[8,8]{{1,0}} dot(%a, %a), lhs_contracting_dims={{1}}
}}

%sine (b: f32[8,8]) -> f32[8,8] {{
  %b = f32[8,8]{{1,0}} parameter(0)
  ROOT %sin = f32[8,8]{{1,0}} sine(%b)
}}

%gather (c: f32[2,8]) -> f32[8,8] {{
  %c = f32[2,8]{{1,0}} parameter(0)
  ROOT %all = f32[8,8]{{1,0}} all-gather(%c), {groups}
}}, execution_thread="sparsecore"

ENTRY %main (part: f32[2,8], x: f32[8,8]) -> f32[8,8] {{
  %part = f32[2,8]{{1,0}} parameter(0)
  %x = f32[8,8]{{1,0}} parameter(1)
{lines}
  ROOT %sum = f32[8,8]{{1,0}} add(%whole, %x)
}}
"""


def collective(lines: str, **given: str):
    lines = lines.format(groups=GROUPS, **given)
    text = MODULE.format(groups=GROUPS, lines=lines)
    (one,) = traffic_of(parse(text), MESH).collectives
    assert (one.kind, one.axes, one.calls) == ("all-gather", ("fsdp",), 1)
    assert (one.payload, one.wire) == (256, 192)
    return one


@pytest.mark.parametrize(
    ("what", "exposed"),
    [(PRODUCT, 0), (KERNEL, 0), (SINE, 192), (BUFFER, 192)],
)
def test_an_exchange_is_covered_by_a_product_or_a_kernel(what, exposed):
    between = f"  %y = {what}"
    assert collective(STARTED, between=between).exposed == exposed
    assert collective(ON_SPARSE_CORE, between=between, before="").exposed == exposed


def test_what_is_before_an_exchange_has_its_operand_does_not_cover_it():
    found = collective(ON_SPARSE_CORE, before=f"  %y = {PRODUCT}", between="")
    assert found.exposed == 192


def test_an_exchange_that_others_wait_for_is_exposed():
    lines = "  %whole = f32[8,8]{{1,0}} all-gather(%part), {groups}\n  %y = {product}"
    assert collective(lines, product=PRODUCT).exposed == 192
