"""cuDNN's attention: JAX's plain one in its place; and its calls, as there is none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import PartitionSpec as P

from engine.models import attention
from engine.models.attention import cudnn, tiles
from engine.parallel.sharding import make_mesh
from tests.engine.tiny_models import relative

R, S, N, K, H = 2, 40, 4, 2, 16
SHAPES = ((R, S, N, H), (R, S, K, H), (R, S, K, H))


@pytest.mark.parametrize("window", [None, 7])
def test_it_is_attention(window):
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.standard_normal(x), jnp.float32) for x in SHAPES]

    def gradient(attend):
        def scalar(query, key, value):
            out = attend(query, key, value, scale=0.3, window=window)
            return jnp.sum(jnp.sin(3 * out)), out

        return jax.jit(jax.grad(scalar, (0, 1, 2), has_aux=True))(*args)

    got = gradient(functools.partial(cudnn.attend, implementation="xla"))
    want = gradient(tiles.attend)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(a, b) < 1e-5


def test_on_a_mesh_its_calls_have_the_types_of_their_arguments(monkeypatch):
    """Of layers with a window and without; no GPU, and no cuDNN, is here."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)
    mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])
    args = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in SHAPES]

    def with_gradients(query, key, value):
        def total(query, key, value):
            out = attention.attend(
                "cudnn",
                query,
                key,
                value,
                scale=0.25,
                softcap=None,
                windows=(None, 7),
                which=jnp.int32(0),
                spans=None,
                longest=None,
                device=jax.devices()[0],
            )
            return out.astype(jnp.float32).sum(), out

        found = jax.grad(total, (0, 1, 2), has_aux=True)(query, key, value)
        for x in jax.tree.leaves(found):
            assert jax.typeof(x).manual_axis_type.varying == {"data"}
        return found

    by_row = jax.shard_map(
        with_gradients, mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    lowered = jax.jit(by_row).trace(*args).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("fmhaSoftmaxBackward") == text.count("fmhaSoftmax(") == 2
    for width in (0, 7):  # 0: none
        assert text.count(rf"sliding_window_length\22: {width},") == 2
