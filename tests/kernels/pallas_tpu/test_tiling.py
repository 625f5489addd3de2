"""Which problems the TPU kernels take, and with which blocks."""

from dataclasses import replace

import jax.numpy as jnp
import pytest

from dpo_kernels.op.backends import load_backend
from dpo_kernels.op.devices import Device
from dpo_kernels.op.tiling import Problem
from dpo_kernels.pallas_tpu import backward_tiling as tpu_backward_tiling
from dpo_kernels.pallas_tpu import logprobs as pallas_tpu
from dpo_kernels.pallas_tpu import tiling as tpu_tiling
from dpo_kernels.xla import logprobs as xla


def problem(**changes) -> Problem:
    v6e = Device(platform="tpu", kind="TPU v6e", num_cores=1)
    values = {"T": 8, "D": 128, "V": 64, "dtype": jnp.dtype(jnp.bfloat16)}
    values |= {"workspace_bytes": 2**28, "device": v6e, "ragged": False}
    return Problem(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"D": 96}, "needs a hidden size that 128 divides; this is D=96"),
        (
            {"dtype": jnp.dtype(jnp.float32)},
            "needs bfloat16 inputs; these are float32",
        ),
        (
            {"device": Device(platform="cpu", kind="cpu")},
            "needs a TPU; this is cpu",
        ),
        (
            {"device": Device(platform="tpu", kind="TPU v4")},
            "needs a TPU v5e, v5p, v6e or 7x; this is TPU v4",
        ),
        (
            {"D": 2**20},
            "needs rows that fit into vector memory; these have D=1048576",
        ),
        ({"T": 0}, None),
        ({"V": 0}, None),
        ({}, None),
    ],
)
def test_what_it_cannot_do(changes, reason):
    asked = problem(**changes)
    assert pallas_tpu.unsupported(asked) == reason
    if reason is not None:
        with pytest.raises(NotImplementedError, match="use xla or auto"):
            load_backend("pallas_tpu", asked)
        assert load_backend("auto", asked) is xla
    else:
        assert load_backend("auto", asked) is pallas_tpu


KINDS = [
    ("TPU v5 lite", 1),
    ("TPU v5p", 2),
    ("TPU v6 lite", 1),
    ("TPU7x", 1),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("T", "ragged"),
    [(1, False), (100, True), (4096, True), (4096, False), (100_000, True)],
)
@pytest.mark.parametrize("D", [128, 4096, 8192, 16384])
def test_blocks_fit_into_vector_memory_and_the_workspace(kind, T, D, ragged):
    device = Device(platform="tpu", kind=kind[0], num_cores=kind[1])
    core = tpu_tiling.core_of(device)
    asked = problem(T=T, D=D, V=128256, device=device, ragged=ragged)
    forward = tpu_tiling.forward_tile(asked)
    backward = tpu_backward_tiling.backward_tile(asked)
    assert core is not None and forward is not None and backward is not None
    row = 2 * D
    arriving = forward.pieces_ahead * forward.piece_t
    used = row * (forward.block_t + arriving + 2 * forward.block_v)
    assert used + 4 * 512 * forward.block_t < core.vmem_bytes
    dlogits, sums = backward.dlogits, (backward.dhidden, backward.dhead)
    used = row * (backward.hidden_buffers * dlogits.rows + 2 * dlogits.columns)
    assert used < core.vmem_bytes
    for one in sums:
        steps = 2 * 2 * one.depth * (one.rows + one.columns)
        assert steps + 4 * one.rows * one.columns < core.vmem_bytes
    assert backward.cores * backward.share_v >= 128256
    rows = -(-T // backward.dhead.depth) * backward.dhead.depth
    shares = 4 * T * D * (backward.cores - 1)
    held = shares + 2 * backward.cores * rows * backward.chunk_v
    assert held <= asked.workspace_bytes
    # Nor is most of the workspace left free while there is more to compute.
    if backward.chunk_v < backward.share_v and T < 10_000:
        assert held > asked.workspace_bytes / 3


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_any_number_of_rows_has_blocks(kind):
    device = Device(platform="tpu", kind=kind[0], num_cores=kind[1])
    # Blocks are multiples of 16; of more than 256 rows, of 256 or all whole ones.
    edges = (x + y for x in (512, 768, 1024) for y in (-15, 0, 1, 17))
    for T in (*range(1, 290, 16), *edges):
        asked = problem(T=T, D=4096, V=32000, device=device)
        forward = tpu_tiling.forward_tile(asked)
        assert forward is not None and forward.block_t >= min(T, 1024)
        assert tpu_backward_tiling.backward_tile(asked) is not None


# Rows, columns, and pieces of rows ahead; MiB that the compiler asked for, where it
# said so, of 127.94 on v6e and 63.94 on the others.
@pytest.mark.parametrize(
    ("kind", "T", "D", "V", "states", "refused"),
    [
        (KINDS[1], 2048, 8192, 128256, 6, (1024, 1024, 2)),  # 69.94
        (KINDS[1], 4096, 16384, 32000, 6, (512, 512, 2)),  # 65.61
        (KINDS[2], 4096, 16384, 32000, 6, (1024, 1024, 4)),  # 139.00
        (KINDS[3], 4096, 4096, 128256, 6, (1024, 2560, 2)),  # 64.02
        (KINDS[3], 4096, 4096, 128256, 6, (1024, 2048, 5)),
        (KINDS[3], 2048, 8192, 128256, 6, (1024, 1024, 2)),
    ],
)
def test_the_forward_s_blocks_are_none_that_a_compiler_refused(
    kind, T, D, V, states, refused
):
    device = Device(platform="tpu", kind=kind[0], num_cores=kind[1])
    asked = problem(T=T, D=D, V=V, device=device)
    tile = tpu_tiling.forward_tile(asked, states=states)
    assert tile is not None
    assert (tile.block_t, tile.block_v, tile.pieces_ahead) < refused


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("rows", [100, 5000, 2**19])
def test_the_least_workspace_is_enough_and_a_tenth_less_is_not(rows, cores):
    kind = {1: "TPU v6e", 2: "TPU v5p"}[cores]
    device = Device(platform="tpu", kind=kind, num_cores=cores)
    asked = problem(T=rows, D=4096, V=128256, device=device)
    least = tpu_backward_tiling.least_workspace(asked)
    for share, fits in ((1.0, True), (0.9, False)):
        given = replace(asked, workspace_bytes=int(share * least))
        found = tpu_backward_tiling.backward_tile(given)
        assert (found is not None) is fits
