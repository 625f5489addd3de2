"""Blocks of the TPU kernels for shapes of a few hundred."""

from dataclasses import replace

from dpo_kernels.pallas_tpu.backward_tiling import Matmul, TpuBackwardTile
from dpo_kernels.pallas_tpu.tiling import TpuForwardTile

VMEM = 100 * 2**20
FORWARD = TpuForwardTile(
    block_t=32, block_v=256, pieces_ahead=1, parts=2, vmem_bytes=VMEM
)
# Several blocks of each kind; the second of two chunks, or of two cores, ends early.
BACKWARD = TpuBackwardTile(
    dlogits=Matmul(rows=16, columns=256, depth=128),
    dhidden=Matmul(rows=16, columns=128, depth=256),
    dhead=Matmul(rows=256, columns=128, depth=32),
    share_v=768,
    chunk_v=512,
    hidden_buffers=2,
    cores=1,
    vmem_bytes=VMEM,
)
TWO_CORES = replace(BACKWARD, cores=2, share_v=512, chunk_v=256)
# Blocks that are as large as the arrays or larger, and sums that are one step's.
LARGE = replace(
    BACKWARD,
    dlogits=Matmul(rows=64, columns=512, depth=128),
    dhidden=Matmul(rows=32, columns=256, depth=512),
    dhead=Matmul(rows=512, columns=128, depth=192),
    share_v=1024,
    chunk_v=1024,
    hidden_buffers=1,
)
