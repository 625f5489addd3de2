"""The GPU backends, compiled for a Hopper that need not be here: do they fit?

    python -m bench.gpu.aot [--quick] [--target h200|h100]

Compiles value-and-gradient in bfloat16 with each backend, on one device and with the
vocabulary sharded over eight, and prints two tables. Of each program: its temporaries
beside the promise (see bench/op/memory.py). Of each kernel in it: registers, spilled
bytes, shared memory and matrix instructions. Exits with 1 where a program takes more
than the promise, a kernel spills or takes more shared memory than there is, a Hopper
kernel has no wgmma in it, or one with several warpgroups reduces across their warps.
Nothing runs: this says nothing about speed.
"""

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import processes, rows
from bench.aot import VARIANTS, compile_op
from bench.gpu.triton_resources import CASES as TRITON_CASES
from bench.gpu.triton_resources import resources as triton_resources
from bench.op.memory import SPARE, TARGETS, WORKSPACE
from dpo_kernels.op.gpu_tiling import SHARED_BYTES

SHAPES = (
    (4096, 4096, 128256),
    (8192, 2304, 256000),
    (4096, 4096, 151936),
    (16384, 8192, 128256),
)
IMPLEMENTATIONS = ("mosaic_gpu", "triton")
KINDS = {"h200": "NVIDIA H200", "h100": "NVIDIA H100 80GB HBM3"}
WARPGROUP = 128  # threads
SPEED_WORKSPACE = 2**30  # keeps the exponentials of (4096, 4096, 128256)


# Axes of one device each, with names that a kernel may have for its own.
TAKEN = ("sm", "cluster", "wg", "block", "sequence")


def absent_mesh(target: str, devices: int) -> Any:
    """A mesh of GPUs that are not here, the vocabulary's axis first."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    described = TARGETS[target]
    config: dict[str, Any] = dict(described.topology)
    assert described.target_config is not None
    config["target_config"] = described.target_config.read_text()
    found = topologies.get_topology_desc(**config).devices[:devices]
    shape = (devices, *(1 for _ in TAKEN))
    return jax.sharding.Mesh(np.array(found).reshape(shape), ("vocab", *TAKEN))


def warp_reductions(layouts: str) -> Iterator[bool]:
    """Of each reduction in a kernel's dump: whether it adds up what several warps hold.

    Its result is then the same in all of them, which its layout says. A reduction to a
    scalar is one of them always.
    """
    for line in layouts.splitlines():
        if " vector.reduction " in line:
            yield True
        elif " vector.multi_reduction " in line:
            result = line.partition("out_layouts = [")[2]
            assert "warp_dims = [" in result, f"a layout of an unknown form: {line}"
            of_warps = result.partition("warp_dims = [")[2].partition("]")[0]
            yield "Replicated" in of_warps


def mosaic_kernels(dump: Path) -> Iterator[dict[str, Any]]:
    """What the assembler says of each kernel that was dumped; empties the folder."""
    for log in sorted(dump.glob("*.ptxas")):
        text, stem = log.read_text(), log.with_suffix("")
        memory = stem.with_suffix(".resources.txt").read_text()
        # Said once or, in a warning that comes first, twice.
        spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill", text)[-1]
        [registers] = re.findall(r"Used (\d+) registers", text)
        [shared] = re.findall(r"smem_scratch_bytes=(\d+)", memory)
        ptx = stem.with_suffix(".ptx").read_text()
        [threads] = re.findall(r"\.maxntid (\d+)", ptx)
        layouts = stem.with_suffix(".after_layout_inference.txt").read_text()
        reductions = list(warp_reductions(layouts))
        yield {
            "kernel": re.sub(r"_\d+$", "", stem.name),
            "registers": int(registers),
            "spill_bytes": sum(map(int, spilled)),
            "shared_bytes": int(shared),
            "wgmma": ptx.count("wgmma.mma_async"),
            "threads": int(threads),
            "reductions": len(reductions),
            "cross_warp_reductions": sum(reductions),
        }
    for file in dump.iterdir():
        file.unlink()


def programs(quick: bool) -> Iterator[tuple[Any, ...]]:
    """(implementation, shape, devices, workspace, variant) of each program."""
    for implementation in IMPLEMENTATIONS:
        first = SHAPES[0]
        if quick and implementation == "mosaic_gpu":
            # Rows of one height, too many to keep all: few kernels, but of both kinds.
            yield implementation, (512, *SHAPES[1][1:]), 1, WORKSPACE, "everything"
            continue
        if quick:
            yield implementation, first, 1, WORKSPACE, "plain"
            continue
        for shape in SHAPES:
            for devices in (1, 8):
                yield implementation, shape, devices, WORKSPACE, "engine"
        for variant in ("plain", "everything"):
            yield implementation, first, 1, WORKSPACE, variant
        for variant in ("plain", "engine"):
            yield implementation, first, 1, SPEED_WORKSPACE, variant


def measure(target: str, quick: bool, dump: Path) -> Iterator[rows.Row]:
    """A row for each program; runs in an environment that dumps kernels to `dump`."""
    for implementation, shape, devices, workspace, variant in programs(quick):
        T, D, V = shape
        start = time.perf_counter()
        options = dict(VARIANTS)[variant]
        compiled = compile_op(
            absent_mesh(target, devices), implementation, shape, workspace, options
        )
        yield rows.row(
            "token_logprobs, forward and gradient",
            implementation,
            T=T,
            D=D,
            V=V,
            dtype="bfloat16",
            device=f"{KINDS[target]}, ahead of time",
            compiler=f"jax-cuda13-plugin {version('jax-cuda13-plugin')}",
            devices=devices,
            variant=variant,
            workspace_bytes=workspace,
            temp_bytes=compiled.memory_analysis().temp_size_in_bytes,
            bound_bytes=workspace + 4 * T * D + SPARE,
            compile_s=round(time.perf_counter() - start, 1),
            kernels=list(mosaic_kernels(dump)),
        )


def triton_row(target: str, case: Any) -> rows.Row:
    """A row with one Triton kernel, compiled by itself."""
    found = triton_resources(case, "bfloat16", KINDS[target])
    return rows.row(
        "token_logprobs, one kernel",
        "triton",
        T=SHAPES[0][0],
        D=SHAPES[0][1],
        V=SHAPES[0][2],
        dtype="bfloat16",
        device=f"{KINDS[target]}, ahead of time",
        compiler=f"triton {version('triton')}",
        variant=case.name,
        kernels=[
            {
                "kernel": case.name,
                "registers": found.registers,
                # The assembler gives instructions here, of four bytes or more each.
                "spill_bytes": 4 * found.spills,
                "shared_bytes": found.shared_bytes,
                "wgmma": int((re.findall(r"\d+", found.matrix) or ["0"])[-1]),
            }
        ],
    )


def problems(row: rows.Row) -> list[str]:
    """What is wrong with it; nothing, if it keeps every promise."""
    found = []
    if "temp_bytes" in row and row["temp_bytes"] > row["bound_bytes"]:
        found.append("temporaries above the bound")
    for kernel in row["kernels"]:
        if kernel["spill_bytes"]:
            found.append(f"{kernel['kernel']} spills")
        if kernel["shared_bytes"] > SHARED_BYTES:
            found.append(f"{kernel['kernel']} takes too much shared memory")
        if not kernel["wgmma"]:
            found.append(f"{kernel['kernel']} has no wgmma")
        # For it Mosaic gives all warpgroups the same scratch, unsynchronised.
        if kernel.get("cross_warp_reductions") and kernel["threads"] > WARPGROUP:
            found.append(f"{kernel['kernel']} reduces across warps: warpgroups race")
    if "temp_bytes" in row and row["implementation"] == "mosaic_gpu":
        names = {kernel["kernel"] for kernel in row["kernels"]}
        for name in ("token_logprobs_forward", "token_logprobs_dlogits"):
            # A slice that is kept whole leaves the second nothing to recompute.
            whole = row["devices"] > 1 or row["workspace_bytes"] > WORKSPACE
            if name not in names and not (whole and name.endswith("dlogits")):
                found.append(f"{name} was not compiled")
    return found


def show(results: Sequence[rows.Row]) -> str:
    """Both tables."""
    compiled = [row for row in results if "temp_bytes" in row]
    first = rows.table(
        ("implementation", "T", "D", "V", "devices", "variant", "workspace MiB")
        + ("temporaries MiB", "bound MiB", "within"),
        [
            (
                *(row[k] for k in ("implementation", "T", "D", "V", "devices")),
                row["variant"],
                *(
                    f"{row[k] / rows.MIB:,.0f}"
                    for k in ("workspace_bytes", "temp_bytes", "bound_bytes")
                ),
                "yes" if row["temp_bytes"] <= row["bound_bytes"] else "NO",
            )
            for row in compiled
        ],
    )
    keys = ("kernel", "registers", "spill_bytes", "shared_bytes", "wgmma")
    kernels = {
        (row["implementation"], row["variant"], *(kernel[k] for k in keys))
        for row in results
        for kernel in row["kernels"]
    }
    second = rows.table(
        ("implementation", "variant", *keys),
        [tuple(map(str, line)) for line in sorted(kernels)],
    )
    return f"{first}\n\n{second}"


def measure_elsewhere(quick: bool, target: str = "h200") -> list[rows.Row]:
    """`measure` in a process whose environment makes the compiler dump its kernels."""
    with tempfile.TemporaryDirectory() as dump:
        changes = {**TARGETS[target].environment, "MOSAIC_GPU_DUMP_TO": dump}
        words = ["--worker", dump, "--target", target] + ["--quick"] * quick
        try:
            return processes.ask("bench.gpu.aot", words, changes)
        except processes.ProcessError as error:
            sys.exit(
                f"compiling for {target} failed; are jax-cuda13-plugin, triton and "
                f"jax-triton installed? {error}"
            )


def main(argv: list[str] | None = None) -> int:
    """Print the tables and write the rows; 1 where something does not fit."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.aot")
    parser.add_argument(
        "--quick", action="store_true", help="one program a backend; writes no rows"
    )
    parser.add_argument("--target", choices=tuple(KINDS), default="h200")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        processes.answer(list(measure(args.target, args.quick, args.worker)))
        return 0
    results = measure_elsewhere(args.quick, args.target)
    cases = TRITON_CASES[: 2 if args.quick else None]
    results += [triton_row(args.target, case) for case in cases]
    print(show(results))
    if not args.quick and args.target == "h200":
        print("wrote", rows.write("gpu_aot", results).relative_to(rows.ROOT))
    wrong = [(row["variant"], text) for row in results for text in problems(row)]
    for variant, text in wrong:
        print(f"{variant}: {text}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
