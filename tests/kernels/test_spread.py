"""The op of rows that are spread over the devices which have the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpo_kernels import spread_token_logprobs, token_logprobs
from dpo_kernels.op.interface import STATS
from dpo_kernels.spread import blocks_of
from dpo_kernels.verify.table import CASES, Case, make_inputs, relative_error

T, D, V = 96, 32, 1000
VALID = np.array([24, 3, 0, 17], np.int32)  # of the 24 rows on each of four devices
MESHES = {
    "all on one axis": ((4,), ("rows",), ("rows",)),
    "rows over two, vocabulary over all": ((2, 2, 2), ("a", "b", "c"), ("a", "b")),
}


def operands(case, dtype="float32"):
    inputs = make_inputs(T, D, V, case, dtype)
    arrays = {name: jnp.asarray(x, dtype) for name, x in inputs.arrays.items()}
    if "bias" in arrays:
        arrays["bias"] = jnp.asarray(inputs.arrays["bias"], jnp.float32)
    options = {
        "softcap": inputs.options.softcap,
        "scale": inputs.options.scale,
        "stats": STATS,
    }
    return arrays, jnp.asarray(inputs.targets), inputs.cotangents, options


def spread_over(mesh_name, arrays, targets, valid, cotangents, block_rows, options):
    """Results and gradients, of rows and vocabulary cut over the mesh."""
    sizes, axes, rows_axis = MESHES[mesh_name]
    devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    mesh = Mesh(devices, axes)
    names = sorted(arrays)
    specs = tuple(P(rows_axis) if name == "hidden" else P(axes) for name in names)

    def local(targets, valid, *values):
        given = dict(zip(names, values, strict=True))
        return spread_token_logprobs(
            given.pop("hidden"),
            given.pop("head"),
            targets,
            num_valid=None if valid is None else valid[0],
            axis_name=axes,
            rows_axis=rows_axis,
            block_rows=block_rows,
            **given,
            **options,
        )

    rows = P(rows_axis)
    run = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, *specs), out_specs=rows)

    def loss(values):
        out = run(targets, valid, *values)
        return (cotangents[0] * out.logprob + cotangents[1] * out.lse).sum(), out

    values = [arrays[name] for name in names]
    grads, out = jax.jit(jax.grad(loss, has_aux=True))(values)
    return out, dict(zip(names, grads, strict=True))


def on_one(arrays, targets, cotangents, options):
    def loss(arrays):
        out = token_logprobs(targets=targets, **arrays, **options)
        return (cotangents[0] * out.logprob + cotangents[1] * out.lse).sum(), out

    grads, out = jax.jit(jax.grad(loss, has_aux=True))(arrays)
    return out, grads


@pytest.mark.parametrize("block_rows", [None, 20], ids=["one block", "five of 5 rows"])
@pytest.mark.parametrize("mesh", MESHES)
def test_it_equals_the_op_of_all_rows(mesh, block_rows):
    """Five rows of each device a block, and of 24 the last block has one too many."""
    arrays, targets, cotangents, options = operands(CASES[3])
    exists = np.arange(24) < VALID[:, None]
    cotangents = cotangents * exists.reshape(-1)
    # What pads the rows may hold anything.
    dirty = arrays | {
        "hidden": jnp.where(exists.reshape(-1, 1), arrays["hidden"], jnp.nan)
    }
    want, want_grads = on_one(arrays, targets, cotangents, options)
    got, grads = spread_over(
        mesh, dirty, targets, jnp.asarray(VALID), cotangents, block_rows, options
    )
    for name in got._fields:
        found, wanted = getattr(got, name), getattr(want, name)
        wanted = jnp.where(exists.reshape(-1), wanted, jnp.zeros_like(wanted))
        if name == "top1":
            np.testing.assert_array_equal(found, wanted)
        else:
            assert relative_error(found, wanted) < 2e-6, name
    for name, wanted in want_grads.items():
        assert relative_error(grads[name], wanted) < 2e-6, name


def test_the_heads_gradient_is_no_worse_in_blocks():
    """In bfloat16: parts that are rounded one by one are added up in float32."""
    arrays, targets, cotangents, options = operands(CASES[1], "bfloat16")
    exact = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    _, truth = on_one(exact, targets, cotangents, options)
    _, plain = on_one(arrays, targets, cotangents, options)
    found = spread_over(
        "all on one axis", arrays, targets, None, cotangents, 8, options
    )[1]
    assert found["head"].dtype == jnp.bfloat16
    off = relative_error(found["head"], truth["head"])
    assert off <= 1.25 * relative_error(plain["head"], truth["head"])


def test_no_device_has_all_rows():
    """Nor their gradients: nothing of more rows than a block's, in any dtype."""
    case = Case(name="", stats=())
    arrays, targets, cotangents, options = operands(case)
    mesh = "all on one axis"
    jaxpr = jax.make_jaxpr(
        lambda arrays, targets: spread_over(
            mesh, arrays, targets, None, cotangents, 32, options
        )
    )(arrays, targets)
    found = set(heights(jaxpr.jaxpr, inside=False))
    assert 32 in found and max(found - {V // 4}) == 32


def heights(jaxpr, inside):
    """Rows of D numbers that any array has, on a device."""
    for equation in jaxpr.eqns:
        on_device = inside or equation.primitive.name == "shard_map"
        inner = list(jaxprs_in_params(equation.params))
        for one in inner:
            yield from heights(one, on_device)
        for x in equation.outvars if inside else ():
            if getattr(x.aval, "shape", ())[-1:] == (D,):
                yield x.aval.size // D


def test_blocks_are_of_twice_the_vocabulary_of_a_device():
    # Llama 3's vocabulary on eight devices: 16,384 rows at least, of 262,144.
    assert blocks_of(32768, 8, 16032) == (16, 2048)
    assert blocks_of(4096, 8, 16032) == (2, 2048)
    assert blocks_of(2048, 8, 16032) == (1, 2048)
    assert blocks_of(32768, 1, 128256) == (1, 32768)
    # On 64 devices as many rows as keep the products in shape.
    assert blocks_of(4096, 64, 2004) == (16, 256)
    assert blocks_of(0, 4, 100) == (1, 0)


def test_rows_are_refused_over_axes_that_the_vocabulary_is_not_split_over():
    mesh = Mesh(np.array(jax.devices()[:2]), ("vocab",))
    run = jax.shard_map(
        lambda h, w, t: (
            spread_token_logprobs(h, w, t, axis_name="vocab", rows_axis="data").lse
        ),
        mesh=mesh,
        in_specs=P("vocab"),
        out_specs=P("vocab"),
    )
    with pytest.raises(ValueError, match="rows_axis='data' must be among axis_name="):
        run(jnp.ones((4, 8)), jnp.ones((6, 8)), jnp.zeros(4, jnp.int32))
