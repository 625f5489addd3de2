import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from engine.parallel.sharding import SPLIT, make_mesh
from engine.planning.hlo import parse
from engine.planning.traffic import axes_of, traffic_of
from tests.engine.tiny_models import mesh_of

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def collectives(function, spec_in, spec_out, *shapes):
    mesh = make_mesh(2, 2, 2, jax.devices()[:8])
    step = jax.shard_map(function, mesh=mesh, in_specs=spec_in, out_specs=spec_out)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = jax.jit(step).lower(*arguments).compile().as_text()
    assert text
    return {
        (x.kind, x.axes): (x.group, x.calls, x.payload, x.wire)
        for x in traffic_of(parse(text), MESH).collectives
    }


def test_each_collective_has_its_axes_calls_and_bytes():
    def f(x):
        def one(h, _):
            whole = lax.all_gather(jnp.sin(h), "fsdp", axis=0, tiled=True)
            return lax.psum_scatter(whole * whole, "fsdp", tiled=True), None

        y = lax.scan(one, x, length=3)[0]
        return lax.psum(y, ("data", "tensor"))

    found = collectives(f, P("fsdp"), P("fsdp"), (8, 16))
    row = 8 * 16 * 4
    assert found[("all-gather", ("fsdp",))] == (2, 3, 3 * row, 3 * row // 2)
    assert found[("reduce-scatter", ("fsdp",))] == (2, 3, 3 * row, 3 * row // 2)
    # Each of a group of four receives 3/4 of the array twice.
    assert found[("all-reduce", ("data", "tensor"))] == (
        4,
        1,
        row // 2,
        3 * row // 4,
    )


def test_axes_that_are_gathered_over_together_are_named_together():
    mesh = mesh_of((1, 2, 2, 2))
    step = jax.shard_map(
        lambda x: lax.all_gather(x, SPLIT, axis=0, tiled=True),
        mesh=mesh,
        in_specs=P(SPLIT, "tensor"),
        out_specs=P(SPLIT, "tensor"),
    )
    lowered = jax.jit(step).lower(jax.ShapeDtypeStruct((8, 16), jnp.float32))
    text = lowered.compile().as_text()
    assert text
    (one,) = traffic_of(parse(text), mesh.shape).collectives
    assert (one.axes, one.group) == (("fsdp", "sequence"), 4)


def test_what_is_along_axes_of_length_one_is_no_communication():
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    step = jax.shard_map(
        lambda x: lax.psum(jnp.sin(x), "fsdp"),
        mesh=mesh,
        in_specs=P("fsdp"),
        out_specs=P(),
    )
    lowered = jax.jit(step).lower(jax.ShapeDtypeStruct((8,), jnp.float32))
    text = lowered.compile().as_text()
    assert text
    found = traffic_of(parse(text), {"data": 1, "fsdp": 1, "tensor": 1})
    assert found.collectives == ()


@pytest.mark.parametrize(
    ("attributes", "axes"),
    [
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}, x", ("fsdp",)),
        (
            "replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','tensor'}",
            ("data", "tensor"),
        ),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, y", ("tensor",)),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("replica_groups=[4,2]<=[8], z", ("tensor",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[2,4]<=[8]", ("fsdp", "tensor")),
        ("replica_groups={}, use_global_device_ids=true", ("data", "fsdp", "tensor")),
        ("source_target_pairs={{0,4},{4,0},{1,5},{5,1}}", ("data",)),
    ],
)
def test_axes_are_those_along_which_a_group_differs(attributes, axes):
    assert axes_of(attributes, MESH) == axes


def fused(chain):
    return f"""\
%fused{chain} (p: bf16[1,4,8]) -> bf16[1,8,8] {{
  %p = bf16[1,4,8]{{2,1,0:T(8,128)(2,1)}} parameter(0)
  ROOT %gather = bf16[1,8,8]{{2,1,0}} all-gather(%p), channel_id=2, \
replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {{'fsdp'}}, dimensions={{1}}, \
frontend_attributes={{chain_id="{chain}"}}
}}
"""


def test_an_exchange_that_libtpu_writes_into_several_fusions_counts_once():
    head = "".join(fused(i) for i in "ab")
    again = fused("a").replace("%fuseda", "%fusedc")
    text = f"""HloModule m

{head}{again}
ENTRY %main (x: bf16[1,4,8]) -> bf16[1,8,8] {{
  %x = bf16[1,4,8]{{2,1,0}} parameter(0)
  %one = bf16[1,8,8]{{2,1,0}} fusion(%x), kind=kCustom, calls=%fuseda
  %two = bf16[1,8,8]{{2,1,0}} fusion(%x), kind=kCustom, calls=%fusedb
  ROOT %three = bf16[1,8,8]{{2,1,0}} fusion(%x), kind=kCustom, calls=%fusedc
}}
"""
    found = traffic_of(parse(text), MESH)
    [gather] = found.collectives
    assert (gather.calls, gather.payload, gather.wire) == (2, 256, 128)


@pytest.mark.parametrize("start", ["", "-start"], ids=["at once", "beside others"])
def test_an_array_that_is_changed_in_place_moves_by_what_is_changed(start):
    """A copy of one of 64 rows, of 8 numbers in float32: read and written."""
    shape = "f32[64,8]{1,0}"
    given = f"({shape}, s32[], f32[1,8]{{1,0}})"
    text = f"""HloModule m

%put (all: f32[64,8], row: s32[], one: f32[1,8]) -> f32[64,8] {{
  %all = {shape} parameter(0)
  %row = s32[] parameter(1)
  %one = f32[1,8]{{1,0}} parameter(2)
  %zero = s32[] constant(0)
  ROOT %put.1 = {shape} dynamic-update-slice(%all, %one, %row, %zero)
}}

ENTRY %main (all: f32[64,8], row: s32[], one: f32[1,8]) -> f32[64,8] {{
  %x = {shape} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[1,8]{{1,0}} parameter(2)
  %f = {f"({given}, {shape}, u32[])" if start else shape} \
fusion{start}(%x, %i, %y), kind=kLoop, calls=%put
  ROOT %g = {shape} {"fusion-done" if start else "bitcast"}(%f)
}}
"""
    assert traffic_of(parse(text), MESH).memory_bytes == 2 * 32 + 4
