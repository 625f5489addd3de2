"""How full the waves of the backward's products are, by shape: from the tiling alone.

    python -m bench.gpu.waves

Writes bench/results/gpu_waves.json. Nothing runs or is compiled, and no GPU need be
here: `dpo_kernels.op.tiling` chooses, and counts what idles in waves that are not full.
"""

import sys
from collections.abc import Iterator

import jax.numpy as jnp

from bench import rows
from dpo_kernels.op.devices import known_gpus
from dpo_kernels.op.tiling import Problem, backward_tile
from dpo_kernels.op.tiling.time import backward_times

RESULTS = "gpu_waves"
DEVICES = ("h200", "h100", "a100", "b200")
MIB = 2**20
# (T, D, V, workspace in MiB, with padding rows)
CASES = (
    (4096, 4096, 128256, 256, False),
    (4096, 4096, 128256, 1024, True),
    (16384, 8192, 128256, 256, True),
    (4096, 4096, 151936, 256, False),
    (1024, 4096, 128256, 256, True),
    (2048, 4096, 128256, 256, True),
    (8192, 2304, 256000, 256, False),
)


def measure() -> Iterator[rows.Row]:
    """A row for each shape on each device, of all its rows."""
    gpus = known_gpus()
    for name in DEVICES:
        for T, D, V, mebibytes, padded in CASES:
            problem = Problem(
                T=T,
                D=D,
                V=V,
                dtype=jnp.dtype("bfloat16"),
                workspace_bytes=mebibytes * MIB,
                device=gpus[name],
                ragged=padded,
            )
            tile = backward_tile(problem, fused=True)
            times = backward_times(problem, tile, fused=True, height=T)
            yield rows.row(
                "token_logprobs, gradient, predicted",
                "mosaic_gpu" if gpus[name].capability == (9, 0) else "triton",
                T=T,
                D=D,
                V=V,
                dtype="bfloat16",
                device=f"{gpus[name].kind}, by arithmetic",
                workspace_bytes=mebibytes * MIB,
                padded=padded,
                block_t=tile.block_t,
                chunk_v=tile.chunk_v,
                keep_v=tile.keep_v,
                predicted_ms=round(1e3 * times.seconds, 3),
                dlogits_efficiency=round(times.dlogits.efficiency, 3),
                dhead_efficiency=round(times.dhead.efficiency, 3),
                dhidden_efficiency=round(times.dhidden.efficiency, 3),
            )


def main() -> int:
    """Print the table and write the rows."""
    results = list(measure())
    keys = ("device", "T", "D", "V", "chunk_v", "keep_v", "dlogits_efficiency")
    keys += ("dhead_efficiency", "dhidden_efficiency", "predicted_ms")
    lines = [tuple(str(row[key]) for key in keys) for row in results]
    print(rows.table(keys, lines))
    print("wrote", rows.write(RESULTS, results).relative_to(rows.ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
