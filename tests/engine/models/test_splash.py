"""JAX's kernels for TPUs, in Pallas's interpreter, give what the plain tiles give."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from engine.models.attention import splash, splash_grid, tiles
from engine.parallel.batch import KeySpans
from engine.parallel.row_parts import RowParts
from engine.parallel.sharding import make_mesh
from tests.engine.tiny_models import relative

R, S, N, K, H = 2, 200, 2, 1, 64
SHAPES = ((R, S, N, H), (R, S, K, H), (R, S, K, H))
BEGIN = np.zeros((R, S), np.int32)
BEGIN[0, 90:], BEGIN[1, 30:], BEGIN[1, 150:] = 90, 30, 150
SPANS = KeySpans(*[jnp.asarray(BEGIN)] * 3)


CASES = [({"window": 40, "softcap": 3.0}, {}), ({"spans": SPANS}, {"longest": 120})]
FORMS = pytest.mark.parametrize("options, reach", CASES, ids=["window", "packed"])


@pytest.fixture
def two_blocks_a_row(monkeypatch):
    monkeypatch.setattr(splash, "BLOCK", 128)


def gradient(attend, options):
    """Of a function of query, key and value; and what attention gives."""

    def scalar(query, key, value, spans):
        given = options | ({"spans": spans} if "spans" in options else {})
        out = attend(query, key, value, scale=0.125, **given)
        return jnp.sum(jnp.sin(3 * out)), out

    return jax.grad(scalar, (0, 1, 2), has_aux=True)


@FORMS
@pytest.mark.usefixtures("two_blocks_a_row")
def test_it_is_attention(options, reach):
    check(options, reach)


def check(options, reach, shapes=SHAPES):
    """Values and gradients are the plain tiles'."""
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.standard_normal(x), jnp.float32) for x in shapes]
    ours = functools.partial(splash.attend, interpret=True, **reach)
    got = jax.jit(gradient(ours, options))(*args, SPANS)
    want = jax.jit(gradient(tiles.attend, options))(*args, SPANS)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(a, b) < 1e-5


def test_a_row_of_one_block_has_one_kernel_for_its_gradients(monkeypatch):
    monkeypatch.setattr(splash, "COMPUTE", 128)
    (sizes,) = {splash.block_sizes(256, 256, x) for x in (256, 40)}
    assert (sizes.block_kv_dkv, sizes.block_kv_dkv_compute) == (256, 128)
    for options, reach in CASES:
        check(options, reach)


@pytest.mark.parametrize("window", [None, 300])
def test_blocks_of_queries_and_keys_that_differ(window):
    """As many as are computed at a time differ, too, in each of the kernels."""
    sizes = splash.kernels.BlockSizes(
        block_q=128,
        block_kv=256,
        block_kv_compute=128,
        block_q_dkv=256,
        block_kv_dkv=512,
        block_kv_dkv_compute=256,
        block_q_dq=512,
        block_kv_dq=128,
    )
    shapes = ((1, 500, N, H), (1, 500, K, H), (1, 500, K, H))
    check({"window": window}, {"sizes": sizes}, shapes)


@pytest.mark.parametrize(
    "length, reach, block, compute",
    [
        (128, 128, 128, 128),
        (384, 384, 384, 384),
        (512, 512, 512, 512),
        (1024, 1024, 1024, 512),
        (1536, 1536, 768, 384),
        (5632, 5632, 512, 512),  # 11 times 512
        (8192, 8192, 1024, 512),
        (8192, 512, 512, 512),  # half of a larger block would be out of sight
        (8192, 700, 512, 512),
        (8192, 4096, 1024, 512),
    ],
)
def test_blocks_divide_the_row(length, reach, block, compute):
    sizes = splash.block_sizes(length, length, reach)
    assert {sizes.block_q, sizes.block_q_dkv} == {block}
    assert {sizes.block_kv, sizes.block_kv_dkv} == {block}
    assert sizes.use_fused_bwd_kernel == (length <= 512)
    separate = None if sizes.use_fused_bwd_kernel else block
    assert {sizes.block_q_dq, sizes.block_kv_dq} == {separate}
    assert {sizes.block_kv_compute, sizes.block_kv_dkv_compute} == {compute}


def test_rows_are_padded_to_no_more_than_before(monkeypatch):
    """A row of 513 tokens to 1024, one of 1100 to 1536: blocks do not ask for more."""
    lengths = []

    def kernel(self, query, *_):
        lengths.append(self.rows.keys)
        assert query.shape[3] == self.rows.padded == self.rows.keys
        return query

    monkeypatch.setattr(splash.Kernel, "__call__", kernel)
    for length in (1, 200, 512, 513, 1100, 2048):
        query, key = (jnp.zeros((1, length, n, H)) for n in (N, K))
        assert splash.attend(query, key, key, scale=1.0).shape == query.shape
    assert lengths == [128, 256, 512, 1024, 1536, 2048]


def runs_of(starts, size, **options):
    """What runs of each row's queries see, by the kernels; and by the tiles."""
    rows = np.concatenate([np.arange(x, x + size) for x in starts])

    def by_kernels(query, key, value, spans):
        where: dict[str, Any] = {"starts": tuple(map(jnp.int32, starts))}
        if spans is not None:
            own = KeySpans(*(x[:, rows] for x in spans))
            where |= {"spans": own, "key_begin": spans.begin}
        attend = functools.partial(splash.attend, scale=0.125, interpret=True)
        out = attend(query[:, rows], key, value, **where | options)
        return jnp.sum(jnp.sin(3 * out)), out

    def by_tiles(query, key, value, spans):
        given = options | {"spans": spans}
        given.pop("longest", None)
        out = tiles.attend(query, key, value, scale=0.125, **given)[:, rows]
        return jnp.sum(jnp.sin(3 * out)), out

    return (
        jax.jit(jax.grad(x, (0, 1, 2), has_aux=True)) for x in (by_kernels, by_tiles)
    )


@pytest.mark.parametrize(
    "starts, size, spans, options",
    [
        ((70, 150), 50, None, {}),
        ((0, 150), 50, SPANS, {"longest": 120, "softcap": 3.0}),
        ((40, 10), 160, SPANS, {"window": 30}),  # no block of queries is whole
    ],
    ids=["padded", "packed", "window"],
)
@pytest.mark.usefixtures("two_blocks_a_row")
def test_runs_of_a_row_see_what_the_whole_row_sees(starts, size, spans, options):
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.standard_normal(x), jnp.float32) for x in SHAPES]
    ours, plain = runs_of(starts, size, **options)
    got, want = ours(*args, spans), plain(*args, spans)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.usefixtures("two_blocks_a_row")
def test_blocks_of_other_sequences_are_not_looked_at():
    """Nor what is later or out of a window: a NaN in them does not get out."""
    shape = (1, 512, N, H), (1, 512, K, H), (1, 512, K, H)
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal(x), jnp.float32) for x in shape
    )
    begin = np.repeat([0, 130, 256], (130, 126, 256)).astype(np.int32)[None]
    spans = KeySpans(*[jnp.asarray(begin)] * 3)
    for hidden, clean, options in (
        (slice(0, 128), slice(256, 512), {"spans": spans}),
        (slice(0, 128), slice(384, 512), {"window": 100}),
        (slice(256, 512), slice(0, 256), {}),
    ):
        attend = functools.partial(splash.attend, scale=0.1, interpret=True, **options)
        out, pullback = jax.vjp(
            jax.jit(attend), query, key.at[:, hidden].set(np.nan), value
        )
        # Blocks of keys that no query with a gradient sees are skipped, too.
        grads = pullback(jnp.zeros_like(out).at[:, clean].set(1.0))
        assert np.isfinite(out[:, clean]).all() and np.isnan(out).any()
        assert np.isfinite(grads[0][:, clean]).all()


@pytest.mark.parametrize("reach", [200, 900, 4096])
@pytest.mark.parametrize("starts", [(0,), (0, 3072), (1024, 2048), (512, 2560)])
def test_grids_have_room_for_all_that_is_seen(starts, reach):
    """Whatever part of the row a device has: in order, each once, and no others."""
    length = 4096 // (len(starts) * 2 if len(starts) > 1 else 1)
    facts = {"length": length, "keys": 4096, "runs": len(starts), "reach": reach}
    known = splash_grid.Rows.of(starts=starts, **facts)
    for rows in known, splash_grid.Rows.of(starts=None, **facts):
        queries = rows.queries(None, jnp.asarray(starts))
        for size, keys in ((512, 512), (1024, 256), (256, 1024)):
            seen = np.asarray(known.queries().blocks(size, keys, 4096 // keys))
            widths = rows.widths(size, keys)
            blocks = queries.blocks(size, keys, 4096 // keys)
            np.testing.assert_array_equal(blocks, seen)
            for by_keys, width in ((False, widths.keys), (True, widths.queries)):
                info = splash_grid.mask_info(
                    blocks,
                    width,
                    queries.number,
                    by_keys=by_keys,
                    runs=rows.runs if by_keys else 1,
                )
                order, runs = (
                    np.asarray(info.data_next)[0],
                    np.asarray(info.block_mask)[0] > 0,
                )
                if by_keys:
                    order, runs = order.T, runs.T
                assert order.shape[1] == width
                every = seen.T if by_keys else seen
                for row, one, wanted in zip(order, runs, every, strict=True):
                    np.testing.assert_array_equal(row[one], np.flatnonzero(wanted))


@FORMS
@pytest.mark.usefixtures("two_blocks_a_row")
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


@FORMS
@pytest.mark.usefixtures("two_blocks_a_row")
def test_rows_that_are_spread_over_devices_have_types_too(options, reach):
    mesh = make_mesh(1, 1, 1, sequence=2, devices=jax.devices()[:2])
    args = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in SHAPES]

    def checked(query, key, value, spans):
        parts = RowParts.of(S)
        where = {"starts": parts.starts}
        if "spans" in options:
            where |= {"spans": parts.own(spans), "key_begin": spans.begin}

        def attend(query, key, value, **given):
            whole = parts.gather(key), parts.gather(value)
            return splash.attend(query, *whole, **given | where, **reach)

        given = {k: v for k, v in options.items() if k != "spans"}
        found = gradient(attend, given)(query, key, value, spans)
        for x in jax.tree.leaves(found):
            assert jax.typeof(x).manual_axis_type.varying == {"sequence"}
        return found

    tokens = P(None, "sequence")
    by_part = jax.shard_map(
        checked, mesh=mesh, in_specs=(*[tokens] * 3, P()), out_specs=tokens
    )
    lowered = jax.jit(by_part).trace(*args, SPANS).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("tpu_custom_call") == 3
