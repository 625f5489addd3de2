"""JAX's kernels for TPUs, in Pallas's interpreter, give what the plain tiles give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from engine.errors import InputError
from engine.models import attention
from engine.models.attention import splash, tiles
from engine.parallel.batch import PADDED, Arrangement, KeySpans
from engine.parallel.sharding import make_mesh
from tests.engine.tiny_models import relative

R, S, N, K, H = 2, 200, 2, 1, 64
SHAPES = ((R, S, N, H), (R, S, K, H), (R, S, K, H))
BEGIN = np.zeros((R, S), np.int32)
BEGIN[0, 90:], BEGIN[1, 30:], BEGIN[1, 150:] = 90, 30, 150
SPANS = KeySpans(*[jnp.asarray(BEGIN)] * 3)


FORMS = pytest.mark.parametrize(
    "options, reach",
    [({"window": 40, "softcap": 3.0}, {}), ({"spans": SPANS}, {"longest": 120})],
    ids=["window", "packed"],
)


@pytest.fixture(autouse=True)
def _two_blocks_a_row(monkeypatch):
    monkeypatch.setattr(splash, "BLOCK", 128)
    splash.kernel_of.cache_clear()
    yield
    splash.kernel_of.cache_clear()


def gradient(attend, options):
    """Of a function of query, key and value; and what attention gives."""

    def scalar(query, key, value, spans):
        given = options | ({"spans": spans} if "spans" in options else {})
        out = attend(query, key, value, scale=0.125, **given)
        return jnp.sum(jnp.sin(3 * out)), out

    return jax.grad(scalar, (0, 1, 2), has_aux=True)


@FORMS
def test_it_is_attention(options, reach):
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.standard_normal(x), jnp.float32) for x in SHAPES]
    ours = functools.partial(splash.attend, interpret=True, **reach)
    got = jax.jit(gradient(ours, options))(*args, SPANS)
    want = jax.jit(gradient(tiles.attend, options))(*args, SPANS)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(a, b) < 1e-5


@FORMS
def test_on_a_mesh_its_arrays_have_the_types_of_their_arguments(options, reach):
    """A row on each device; the interpreter itself cannot do that."""
    mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])
    ours = functools.partial(splash.attend, **reach)
    args = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in SHAPES]

    def checked(query, key, value, spans):
        given = options | ({"spans": spans} if "spans" in options else {})
        alone = ours(query, key, value, scale=0.125, **given)
        found = alone, gradient(ours, options)(query, key, value, spans)
        for x in jax.tree.leaves(found):
            assert jax.typeof(x).manual_axis_type.varying == {"data"}
        return found

    by_row = jax.shard_map(checked, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    lowered = jax.jit(by_row).trace(*args, SPANS).lower(lowering_platforms=("tpu",))
    # Alone; for the gradient: forward, dq, dk and dv.
    assert lowered.as_text().count("tpu_custom_call") == 4


def test_which_one_a_run_has():
    assert attention.choose("auto", "tpu", PADDED) == "splash"
    assert attention.choose("auto", "tpu", Arrangement(packing=True)) == "splash"
    assert attention.choose("auto", "gpu", PADDED) == "tiles"
    assert attention.choose("tiles", "tpu", PADDED) == "tiles"
    shared = Arrangement(share_prompt=True)
    assert attention.choose("auto", "tpu", shared) == "tiles"
    with pytest.raises(InputError, match="'splash' cannot be: its rows have no place"):
        attention.choose("splash", "tpu", shared)
    with pytest.raises(InputError, match="for TPUs, and the devices are of .* cpu"):
        attention.choose("splash", "cpu", PADDED)
    assert attention.choose("auto", "tpu", PADDED, sequence=2) == "tiles"
    with pytest.raises(InputError, match=r"whole rows \(sharding.sequence=2\); use"):
        attention.choose("splash", "tpu", PADDED, sequence=2)
