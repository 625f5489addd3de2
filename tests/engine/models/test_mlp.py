"""MLPs of a tile of tokens at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from dpo_kernels.verify.table import relative_error
from engine.models.adapter import Adapter
from engine.models.dropout import Dropout
from engine.models.linear import Linears
from engine.models.mlp import mlp
from engine.models.remat import REMAT
from engine.parallel.sharding import TENSOR, TOKENS, make_mesh
from tests.engine.tiny_models import gradient_equations

R, S, D, F = 3, 20, 16, 48
ADAPTER = Adapter(rank=4, alpha=8, modules=("gate_proj", "up_proj", "down_proj"))


def weights(adapted):
    rng = np.random.default_rng(0)
    shapes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
    made = {}
    for name, (out, size) in shapes.items():
        made[name] = rng.normal(size=(out, size)) / size**0.5
        made[name + "_bias"] = rng.normal(size=out) / 4
        if adapted:
            made[name + "_lora_a"] = rng.normal(size=(4, size)) / size**0.5
            made[name + "_lora_b"] = rng.normal(size=(out, 4)) / 2
    return {name: jnp.asarray(x, jnp.float32) for name, x in made.items()}


def run(tile, dtype="float32", *, adapted=False, dropped=False):
    """The output and the gradients of what is trained, and of x."""
    rng = np.random.default_rng(1)
    x, dout = (jnp.asarray(rng.normal(size=(R, S, D)), dtype) for _ in range(2))
    prefixes = jnp.asarray(rng.integers(2**32, size=(R, S), dtype=np.uint32))
    whole = weights(adapted)
    trained = {n: w for n, w in whole.items() if "lora" in n or not adapted}

    def local(trained, x, prefixes):
        dropout = None
        if dropped:
            key = jax.random.key(3, impl="threefry2x32")
            dropout = Dropout(rate=0.3, key=key, prefixes=prefixes)
        # As the step has them, and a layer its input.
        given = {
            name: lax.pcast(
                w, TOKENS if name == "down_bias" else (*TOKENS, TENSOR), to="varying"
            )
            for name, w in (whole | trained).items()
        }
        linears = Linears(
            weights=given,
            adapter=ADAPTER if adapted else None,
            dropout=dropout,
            reduce_dtype=dtype,
        )
        return mlp(linears, lax.pcast(x, TENSOR, to="varying"), "silu", tile)

    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P(TOKENS), P(TOKENS)), out_specs=P(TOKENS)
    )
    out, pull = jax.vjp(lambda w, x: sharded(w, x, prefixes), trained, x)
    return out, pull(dout)


@pytest.mark.parametrize("tile", [20, 17], ids=["three tiles", "four, padded"])
@pytest.mark.parametrize(
    "options",
    [{}, {"adapted": True}, {"adapted": True, "dropped": True}],
    ids=["all trained", "adapters", "dropout"],
)
def test_tiles_give_what_all_tokens_at_once_give(options, tile):
    want, got = (jax.jit(lambda t=t: run(t, **options))() for t in (0, tile))
    assert relative_error(got, want) < 1e-6


def test_weights_have_gradients_that_are_rounded_once():
    """In bfloat16, of twelve tiles: no further from float32's than of a single one."""
    truth = run(0)[1]
    whole, tiled = (run(tile, "bfloat16")[1] for tile in (0, 5))
    for name in ("gate", "up", "down"):
        off = relative_error(tiled[0][name], truth[0][name])
        assert off <= 1.1 * relative_error(whole[0][name], truth[0][name])
        # What is the same but for the order of a sum in float32.
        assert relative_error(tiled[0][name], whole[0][name]) < 2.0**-8


@pytest.mark.parametrize("remat", REMAT)
def test_only_what_is_computed_again_is_tiled(remat):
    """Eight rows of 16 tokens on eight devices, in tiles of four."""
    lengths = {
        equation.params["length"]
        for equation in gradient_equations(remat=remat, mlp_tile=4)
        if equation.primitive.name == "scan"
    }
    assert (4 in lengths) == (remat in ("full", "offload"))
