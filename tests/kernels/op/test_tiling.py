"""The choice of tiles on GPUs: whole waves, within the workspace."""

import functools
import itertools
from dataclasses import replace

import jax.numpy as jnp
import pytest

from dpo_kernels.op import tiling
from dpo_kernels.op.devices import Device, gpu_speed, known_gpus
from dpo_kernels.op.tiling import choice, fits
from dpo_kernels.op.tiling.__main__ import main
from dpo_kernels.op.tiling.time import (
    FUSED_BLOCK,
    LIBRARY_BLOCK,
    backward_seconds,
    backward_times,
    product,
)

# (T, D, V, workspace in MiB, with padding rows)
SHAPES = (
    (4096, 4096, 128256, 256, False),
    (4096, 4096, 128256, 1024, True),
    (16384, 8192, 128256, 256, True),
    (4096, 4096, 151936, 256, False),
    (1024, 4096, 128256, 256, True),
    (2048, 4096, 128256, 256, True),
    (8192, 2304, 256000, 256, False),
)


def problem(T, D, V, mebibytes=256, ragged=False, device="h200", dtype="bfloat16"):
    return tiling.Problem(
        T=T,
        D=D,
        V=V,
        dtype=jnp.dtype(dtype),
        workspace_bytes=mebibytes * 2**20,
        device=known_gpus()[device],
        ragged=ragged,
    )


def test_a_wave_that_is_not_full_costs_a_full_one():
    """Of 66 pairs of multiprocessors; 4096 rows are 16 blocks, 7552 entries 29.5."""
    one = product(4096, 7552, 4096, FUSED_BLOCK, 132, 3)
    assert one.waves == 3 * 8  # 16 * 30 blocks are 7.3 times 66
    assert one.efficiency == pytest.approx(16 * 29.5 / (8 * 66))
    # 59 blocks of 128 rows by 16 of 256, a multiprocessor each.
    library = product(7552, 4096, 4096, LIBRARY_BLOCK, 132, 1)
    assert library.waves == 8
    assert library.efficiency == pytest.approx(59 * 16 / (8 * 132))
    exact = product(4096, 33 * 256, 4096, FUSED_BLOCK, 132, 1)
    assert (exact.waves, exact.efficiency) == (8, 1)
    assert product(4096, 7552, 4096, FUSED_BLOCK, None, 1).efficiency == 1


@functools.cache
def chosen(asked: tiling.Problem) -> tiling.BackwardTile:
    return tiling.backward_tile(asked, fused=True)


@pytest.mark.parametrize(
    ("device", "shape"),
    [
        *itertools.product(["h200"], SHAPES),
        *itertools.product(["h100", "a100", "b200"], SHAPES[::2]),
    ],
)
def test_chunks_fill_whole_waves(shape, device):
    asked = problem(*shape, device=device)
    tile = chosen(asked)
    times = backward_times(asked, tile, fused=True, height=asked.T)
    assert times.dlogits.efficiency >= 0.95, tile
    assert times.dhead.efficiency >= 0.95, tile


@pytest.mark.parametrize("shape", SHAPES)
def test_all_that_is_tried_fits_and_nothing_is_faster(shape):
    asked = problem(*shape)
    tile = chosen(asked)
    tried = list(choice.backward_candidates(asked, fused=True))
    seconds = backward_seconds(asked, tile, fused=True)
    for other in tried:
        taken = fits.workspace_bytes(asked, other, fused=True)
        assert taken <= asked.workspace_bytes, other
        assert seconds <= backward_seconds(asked, other, fused=True), other


def test_the_last_chunk_has_room_for_zeros_where_padding_is_skipped():
    """XLA has them ready beside it: after 17 chunks of 8448 8320 are too many."""
    asked = problem(4096, 4096, 151936, 256, ragged=True)
    hidden, zeros = 2 * 4096 * 4096, 2 * 4096
    column = 2 * 4096 + 2 * 2 * 4096
    candidates = list(choice.backward_candidates(asked, fused=True))
    (even,) = (x for x in candidates if x.chunk_v == 8448)
    assert not fits.tail_fits(asked, even, fused=True)
    tail = 151936 % chosen(asked).chunk_v
    assert hidden + tail * (column + zeros) <= 2**28
    # Without padding there are none, nor where the tail is a short one.
    assert fits.tail_fits(replace(asked, ragged=False), even, fused=True)
    assert fits.tail_fits(replace(asked, V=128256), even, fused=True)


@pytest.mark.parametrize("rows", [1, 2, 3, 511, 512, 513, 1024])
@pytest.mark.parametrize("ragged", [False, True])
def test_any_number_of_rows_has_a_tile(rows, ragged):
    """A single row cannot be halved."""
    asked = problem(rows, 64, 1003, 256, ragged=ragged)
    for other in choice.backward_candidates(asked, fused=True):
        assert 1 <= other.block_t <= rows and other.heights[-1] == rows
    assert tiling.backward_tile(asked, fused=True).block_t <= rows


def test_exponentials_are_kept_where_that_is_faster():
    """At a hidden size of 64 it is less work to compute them again."""
    asked = problem(4096, 64, 128256, 2048)
    assert tiling.backward_tile(asked, fused=True).keep_v == 0
    asked = problem(4096, 4096, 128256, 2048)
    assert tiling.backward_tile(asked, fused=True).keep_v == 128256


def test_devices_are_known_by_the_names_of_their_drivers():
    def kind(name: str) -> float:
        return gpu_speed(Device(platform="gpu", kind=name)).bytes_per_s

    assert kind("NVIDIA H100 80GB HBM3") == 3.35e12
    assert kind("NVIDIA H200") == 4.8e12
    assert kind("NVIDIA GH200 480GB") == 4.9e12
    assert kind("NVIDIA Unheard-of") == 2.0e12
    for name, device in known_gpus().items():
        assert name in device.kind.lower()
        assert device.num_cores and device.capability


def test_the_choice_can_be_looked_at(capsys):
    assert main(["4096", "4096", "128256", "--device", "h100"]) == 0
    out = capsys.readouterr().out
    assert "H100 (compute capability 9.0), 132 multiprocessors" in out
    assert "3.35 TB/s" in out and "(37 blocks)" in out
    assert "waves, efficiency 0.996" in out and "predicted" in out


def test_a_workspace_that_holds_nothing_is_one_line(capsys):
    assert main(["4096", "4096", "128256", "--workspace", "1"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "give at least 4196352" in said
