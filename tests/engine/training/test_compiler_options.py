"""What compilers are told, and what comes of it on devices that are not here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from engine.errors import InputError
from engine.models.linear import gathered
from engine.parallel.sharding import FSDP, SPLIT, make_mesh
from engine.planning.hlo import parse
from engine.planning.traffic import traffic_of
from engine.training.compiler_options import compiler_options, known_options
from tests.engine.planning.runs import absent_devices
from tests.engine.tiny_models import mesh_of

ALWAYS = {"xla_allow_excess_precision": False}
D, F, ROWS = 512, 2048, 1024


class FakeGpu:
    device_kind = "NVIDIA H200"
    platform = "gpu"


def absent(target: str, monkeypatch):
    return make_mesh(1, -1, 1, absent_devices(target, monkeypatch))


@pytest.mark.parametrize("target", ["v5p:2x2x1", "v6e:2x2", "tpu7x:1x1x1"])
def test_sparse_cores_gather_and_add_up_or_are_told_not_to(target, monkeypatch):
    mesh = absent(target, monkeypatch)
    for overlap in (True, False):
        told = compiler_options(mesh, overlap=overlap)
        assert told.items() > ALWAYS.items()
        others = {name: x for name, x in told.items() if name not in ALWAYS}
        assert set(others.values()) == {overlap}
        assert {x.partition("_offload_")[2] or x for x in others} == {
            *("all_gather", "2d_all_gather", "3d_all_gather"),
            *("reduce_scatter", "nd_reduce_scatter"),
            "xla_tpu_prefer_async_allgather_to_allreduce",
        }


def test_elsewhere_compilers_overlap_by_themselves(monkeypatch):
    gpus = [FakeGpu(), FakeGpu()]
    for mesh, name in (
        (absent("v5e:2x2", monkeypatch), "xla_tpu_enable_async_collective_fusion"),
        (Mesh(np.array(gpus), (FSDP,)), "xla_gpu_enable_latency_hiding_scheduler"),
    ):
        assert compiler_options(mesh, overlap=True) == ALWAYS
        assert compiler_options(mesh, overlap=False) == ALWAYS | {name: False}


def test_one_device_and_cpus_are_told_nothing_of_it(monkeypatch):
    order = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    for overlap in (True, False):
        for mesh, more in (
            (mesh_of((1, 2, 1)), {}),
            (mesh_of((1, 1, 1)), order),
            (absent("v6e:1x1", monkeypatch), {}),
        ):
            assert compiler_options(mesh, overlap=overlap) == ALWAYS | more


def test_an_option_that_a_compiler_does_not_know_is_one_line():
    step = jax.jit(lambda x: x + 1, compiler_options={"xla_not_yet": True})
    with (
        pytest.raises(InputError, match=r"does not know.*'xla_not_yet'.*constraints"),
        known_options(),
    ):
        step.lower(1).compile()


@pytest.mark.parametrize(
    ("target", "overlap", "added_by"),
    [
        ("v5p:2x2x2", True, "reduce-scatter"),
        ("v5p:2x2x2", False, "all-reduce"),  # libtpu's own choice on three dimensions
        ("v5p:4x4x4", True, "reduce-scatter"),  # where it gathers by adding up, too
        ("v5e:2x4", True, "reduce-scatter"),
    ],
)
def test_what_layers_exchange_runs_beside_their_products(
    target, overlap, added_by, monkeypatch
):
    mesh = absent(target, monkeypatch)
    specs = P(None, None, SPLIT), P(None, SPLIT, None)

    def loss(weights, rows):
        def layer(hidden, shards):
            up, down = (
                gathered(x, axis, "bfloat16", "bfloat16")
                for x, axis in zip(shards, (1, 0), strict=True)
            )
            inner = jnp.einsum("RI,OI->RO", hidden, up)
            return hidden + jnp.einsum("RI,OI->RO", inner, down), None

        layer = jax.checkpoint(layer, prevent_cse=False)
        return jnp.sum(lax.scan(layer, rows, weights)[0].astype(jnp.float32))

    step = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=(specs, P(SPLIT)), out_specs=specs
    )

    def of(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    weights = (
        of((4, F, D), jnp.float32, specs[0]),
        of((4, D, F), jnp.float32, specs[1]),
    )
    rows = of((ROWS * mesh.size, D), jnp.bfloat16, P(SPLIT))
    told = compiler_options(mesh, overlap=overlap)
    text = jax.jit(step, compiler_options=told).lower(weights, rows).compile().as_text()
    assert text
    found = {x.kind: x for x in traffic_of(parse(text), dict(mesh.shape)).collectives}
    assert set(found) == {"all-gather", added_by}
    # Two matrices in bfloat16: gathered in the forward and again in the backward, where
    # their gradients are added up.
    matrices = 4 * 2 * D * F * 2
    assert found["all-gather"].payload == 2 * matrices
    assert found[added_by].payload == matrices
    share = (mesh.size - 1) / mesh.size
    twice = 1 + (added_by == "all-reduce")
    assert found[added_by].wire == twice * share * matrices
    for one in found.values():
        if not overlap:
            assert one.exposed == one.wire
    if overlap:  # a layer's first gather waits for nothing that it could run beside
        assert 0 < found["all-gather"].exposed < found["all-gather"].wire
        if target != "v5e:2x4":
            assert found[added_by].exposed == 0
