"""Which tiles are chosen for a shape, and what they are predicted to cost.

    python -m dpo_kernels.op.tiling T D V --device h200 [--workspace MIB] [--padded]

A prediction by the arithmetic of `time.py`; nothing runs, and no GPU need be here.
"""

import argparse
import sys
from collections.abc import Iterator

import jax.numpy as jnp

from dpo_kernels.op.devices import gpu_speed, known_gpus
from dpo_kernels.op.tiling import fits
from dpo_kernels.op.tiling.choice import backward_tile
from dpo_kernels.op.tiling.problem import BackwardTile, Problem
from dpo_kernels.op.tiling.time import (
    FUSED_BLOCK,
    SUSTAINED,
    backward_times,
    product,
)

_MIB = 2**20


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dpo_kernels.op.tiling")
    for name, what in (("T", "scored tokens"), ("D", "hidden"), ("V", "vocabulary")):
        parser.add_argument(name, type=_positive, help=what)
    parser.add_argument("--device", choices=tuple(known_gpus()), default="h200")
    parser.add_argument(
        "--workspace", type=_positive, default=256, metavar="MIB", help="default: 256"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16"
    )
    parser.add_argument(
        "--padded", action="store_true", help="num_valid is given: rows may be padding"
    )
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def report(problem: Problem, tile: BackwardTile) -> Iterator[str]:
    """Lines: the tile, what it takes, and for each height its waves and its time."""
    device, speed = problem.device, gpu_speed(problem.device)
    taken = fits.workspace_bytes(problem, tile, fused=True)
    yield (
        f"{device}, {device.num_cores} multiprocessors, "
        f"{speed.flops_per_s / 1e12:.0f} TFLOP/s, {speed.bytes_per_s / 1e12:.2f} TB/s"
    )
    yield (
        f"rows a block: {tile.block_t} of {problem.T}; vocabulary a chunk: "
        f"{tile.chunk_v} of {problem.V} ({tile.chunk_v / FUSED_BLOCK.columns:g} blocks)"
    )
    yield (
        f"exponentials kept: {tile.keep_v} entries; workspace: {taken / _MIB:.0f} of "
        f"{problem.workspace_bytes / _MIB:.0f} MiB"
    )
    flops_per_s = SUSTAINED * speed.flops_per_s * 2 / problem.itemsize
    whole = (problem.V, problem.D, FUSED_BLOCK, device.num_cores, 1)
    for height in tile.heights:
        times = backward_times(problem, tile, fused=True, height=height)
        forward = product(height, *whole)
        yield f"{height} rows:"
        named = {
            "forward": forward,
            "dlogits": times.dlogits,
            "d hidden": times.dhidden,
            "d head": times.dhead,
        }
        for name, one in named.items():
            yield (
                f"  {name:<9}{one.calls:>5} calls {one.waves:>7} waves, efficiency "
                f"{one.efficiency:.3f}, {1e3 * one.done / flops_per_s:8.3f} ms"
            )
        rest = times.seconds - times.products_s
        yield f"  the rest of the backward {1e3 * rest:34.3f} ms"
        total = forward.done / flops_per_s + times.seconds
        yield f"  forward and gradient, predicted {1e3 * total:27.3f} ms"


def main(argv: list[str] | None = None) -> int:
    """Print the choice; 2 where nothing fits."""
    args = parse(argv)
    problem = Problem(
        T=args.T,
        D=args.D,
        V=args.V,
        dtype=jnp.dtype(args.dtype),
        workspace_bytes=args.workspace * _MIB,
        device=known_gpus()[args.device],
        ragged=args.padded,
    )
    try:
        tile = backward_tile(problem, fused=True)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(report(problem, tile)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
