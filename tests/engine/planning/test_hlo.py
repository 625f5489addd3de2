import jax
import jax.numpy as jnp
import pytest
from jax import lax

from engine.planning.hlo import parse, size_of
from engine.planning.traffic import traffic_of

MESH = {"data": 1, "fsdp": 1, "tensor": 1}


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.jit(function).lower(*arguments).compile()
    text, cost = program.as_text(), program.cost_analysis()
    assert text and cost
    return text, cost["bytes accessed"]


def sines(text):
    """How often a sine is taken, of each sine in the program."""
    program = parse(text)
    found = [x.trips for x in program.executed() if x.instruction.opcode == "sine"]
    return found, program.unknown_loops


def loops(x):
    def inner(y, _):
        return jnp.sin(y), None

    def outer(y, _):
        return jnp.cos(lax.scan(inner, y, length=5)[0]), None

    return lax.scan(outer, x, length=3)[0]


def test_what_is_in_loops_runs_as_often_as_they_do():
    text = compiled(loops, (4,))[0]
    assert "known_trip_count" in text
    assert sines(text) == ([15], set())


def test_a_loop_without_its_length_beside_it_is_read_from_its_condition():
    """As a TPU's compiler writes it."""
    assert sines(TPU_LOOP) == ([4], set())


TPU_LOOP = """\
HloModule jit_f

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%p), index=1
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %one)
  %y = f32[8]{0:T(128)} sine(%x)
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%next, %y)
}

%condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(6)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %bound), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0:T(128)} parameter(0)
  %first = s32[]{:T(128)} constant(2)
  %start = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%first, %a)
  %w = (s32[], /*index=1*/f32[8]{0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8]{0:T(128)} get-tuple-element(%w), index=1
}
"""


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    def f(x, n):
        return lax.while_loop(
            lambda s: s[0] < n[0], lambda s: (s[0] + 1, jnp.sin(s[1])), (0.0, x)
        )[1]

    found, unknown = sines(compiled(f, (4,), (1,))[0])
    assert found == [1] and len(unknown) == 1


def test_of_branches_the_largest_counts():
    def f(x, n):
        return lax.cond(n[0] > 0, lambda y: jnp.sin(jnp.sin(y) + 1), jnp.cos, x)

    found, _ = sines(compiled(f, (4000,), (1,))[0])
    assert found == [1, 1]


@pytest.mark.parametrize(
    ("shape", "bytes_", "slow"),
    [
        ("f32[2,3]{1,0}", 24, 24),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048, 0),
        ("(s32[], /*index=1*/bf16[4]{0}, f8e4m3fn[16]{0}, s4[3]{0}, pred[5])", 35, 35),
        ("token[]", 0, 0),
    ],
)
def test_the_size_of_a_shape(shape, bytes_, slow):
    assert size_of(shape) == bytes_
    assert size_of(shape, slow=True) == slow


def moved(function, *shapes):
    text, once = compiled(function, *shapes)
    return traffic_of(parse(text), MESH).memory_bytes, once


def test_memory_traffic_without_loops_is_the_compilers():
    def f(x, y):
        return jnp.sin(x) @ y + 1

    ours, compilers = moved(f, (256, 128), (128, 512))
    assert ours == pytest.approx(compilers, rel=0.02)


def test_a_scan_over_a_stack_reads_a_slice_at_a_time():
    size, layers = 200 * 200 * 4, 50

    def f(x, stack):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, stack)[0]

    ours, once = moved(f, (200, 200), (layers, 200, 200))
    # Of each layer its weights, what comes in, the product, and what goes out, of which
    # a fusion may save the product; and a slice may be copied.
    assert layers * 3 * size <= ours <= layers * 9 * size
    assert once < ours / 5


def test_a_stack_of_results_is_written_a_slice_at_a_time():
    size, layers = 200 * 200 * 4, 50

    def f(x):
        def one(h, _):
            h = jnp.tanh(h @ x)
            return h, h

        return lax.scan(one, x, length=layers)[1]

    ours, _ = moved(f, (200, 200))
    assert layers * 3 * size <= ours <= layers * 9 * size
