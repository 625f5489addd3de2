"""What the search over tiles tries, and that a candidate is what is traced."""

import dataclasses
import importlib

import jax.numpy as jnp
import pytest

from bench.gpu import search
from dpo_kernels.op.devices import known_gpus
from dpo_kernels.op.tiling import Problem, fits

MAIN = Problem(
    T=4096,
    D=4096,
    V=128256,
    dtype=jnp.dtype("bfloat16"),
    workspace_bytes=2**28,
    device=known_gpus()["h200"],
    ragged=False,
)


@pytest.mark.parametrize("chunk_v", [4096, 8448])
def test_a_chunk_of_that_width_fits(chunk_v):
    tile = search.with_chunk(chunk_v, MAIN, fused=True)
    assert tile.chunk_v == chunk_v
    assert fits.workspace_bytes(MAIN, tile, fused=True) <= MAIN.workspace_bytes


def test_a_chunk_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="chunk_v=12288 does not fit"):
        search.with_chunk(12288, MAIN, fused=True)


def test_tiles_beyond_the_shared_memory_are_not_compiled():
    assert not search.fits_the_chip("mosaic_gpu", {"stages": 5})
    assert search.fits_the_chip("mosaic_gpu", {"stages": 5, "block_v": 192})
    assert search.fits_the_chip("mosaic_gpu", {"chunk_v": 8448})
    assert search.fits_the_chip("triton", {"num_stages": 5})


def test_a_candidate_is_what_is_traced():
    """The chunk reaches the op's own choice, and is undone after it."""
    op = importlib.import_module("dpo_kernels.op.rule")
    before = op.backward_tile
    space = dataclasses.replace(search.SPACES["triton"], fields={})
    seen = []

    def call(_):
        seen.append(op.backward_tile(MAIN, fused=True).chunk_v)

    search.with_tile(space, {"chunk_v": 4096}, call)(None)
    assert seen == [4096] and op.backward_tile is before
