"""Search the block sizes of a backend: time candidates, print the winner per shape.

    python -m bench.gpu.search [--implementation NAME] [--limit SECONDS] [--rehearse]

One field of the tile after the other: all of its values are timed in turns, beside the
bare product, with the other fields at the best so far. Every candidate is a row of
bench/results/gpu_tiles.json; `pct_peak` is its share of R. The winners belong in
`dpo_kernels/op/gpu_tiling.py`, and what they say of the backward's chunks in
`dpo_kernels/op/tiling/time.py`.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from bench import rows
from bench.device import plan, programs
from bench.device.subject import Subject, why
from bench.device.timing import take_turns
from bench.gpu import sizes as gpu_sizes
from bench.gpu.clocks import clocks
from dpo_kernels.op import gpu_tiling
from dpo_kernels.op.compilation import Compiler
from dpo_kernels.op.tiling import BackwardTile, Problem
from dpo_kernels.op.tiling.choice import backward_candidates
from dpo_kernels.op.tiling.time import backward_seconds

RESULTS = "gpu_tiles"
Changes = dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """Where a backend finds its tile, and the values to try for each field."""

    module: str
    function: str
    fields: Mapping[str, Sequence[int]]


# In the order of what decides most.
SPACES = {
    "mosaic_gpu": Space(
        module="dpo_kernels.mosaic_gpu.logprobs",
        function="mosaic_tile",
        fields={
            "cluster": (1, 2),
            "block_v": (128, 192, 256),
            "stages": (3, 4, 5),
            "group_t": (2, 4, 8, 16),
        },
    ),
    "triton": Space(
        module="dpo_kernels.op.gpu_tiling",
        function="triton_tile",
        fields={
            "block_v": (128, 256),
            "block_t": (64, 128, 256),
            "num_stages": (3, 4, 5),
            "num_warps": (4, 8),
            "block_d": (32, 64, 128),
            "group_t": (4, 8, 16, 32),
        },
    ),
    "xla": Space(
        module="dpo_kernels.op.tiling",
        function="xla_forward_tile",
        fields={"chunk_v": (64, 128, 256), "block_t": (16, 64)},
    ),
}
# Of the shared backward: how much of the vocabulary a chunk has.
CHUNKS = Space(
    module="dpo_kernels.op.rule",
    function="backward_tile",
    fields={"chunk_v": (4096, 6144, 8192, 8448, 9472, 12288)},
)
OPS: dict[str, Callable[[programs.Logprobs], Callable]] = {
    plan.FORWARD: programs.forward,
    plan.GRADIENT: programs.gradient,
}


def with_tile(space: Space, changes: Changes, call: Callable) -> Callable:
    """`call`, traced with some fields of the backend's tile changed."""
    module = importlib.import_module(space.module)
    chosen = getattr(module, space.function)
    chunks = importlib.import_module(CHUNKS.module)
    own = {name: x for name, x in changes.items() if name in space.fields}
    chunk_v = None if "chunk_v" in own else changes.get("chunk_v")

    def changed(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(chosen(*args, **kwargs), **own)

    def traced(x: programs.Inputs) -> Any:
        with contextlib.ExitStack() as stack:
            if own:
                stack.enter_context(mock.patch.object(module, space.function, changed))
            if chunk_v is not None:
                of_width = functools.partial(with_chunk, chunk_v)
                stack.enter_context(
                    mock.patch.object(chunks, CHUNKS.function, of_width)
                )
            return call(x)

    return traced


def with_chunk(chunk_v: int, problem: Problem, *, fused: bool) -> BackwardTile:
    """The fastest tile with such chunks, by the tiling's own time."""
    found = [
        tile for tile in backward_candidates(problem, fused) if tile.chunk_v == chunk_v
    ]
    if not found:
        raise ValueError(f"{chunk_v=} does not fit into {problem.workspace_bytes=}")
    return min(found, key=lambda tile: backward_seconds(problem, tile, fused=fused))


def fits_the_chip(name: str, changes: Changes) -> bool:
    """Whether it is worth compiling; only a Hopper tile is known to be too large."""
    if name != "mosaic_gpu":
        return True
    own = {key: x for key, x in changes.items() if key in SPACES[name].fields}
    try:
        gpu_tiling.MosaicTile(**own)
    except ValueError:
        return False
    return True


@dataclasses.dataclass(kw_only=True)
class Search:
    """One backend, operation and shape."""

    name: str
    op: str
    shape: plan.Shape
    sizes: plan.Plan
    take: Callable[[rows.Row], None]

    def subject(self, changes: Changes) -> Subject:
        """Of a candidate's row."""
        T, D, V = self.shape
        setting = ", ".join(f"{k}={x}" for k, x in changes.items()) or "as it is"
        return Subject(
            op=self.op, implementation=self.name, T=T, D=D, V=V, setting=setting
        )

    def compile(self, candidates: Sequence[Changes], x: programs.Inputs) -> Iterator:
        """Each candidate that compiles, and its program; a row for each that fails."""
        call = OPS[self.op](programs.ours(self.name, plan.WORKSPACE))
        use = Compiler()
        jobs = [
            use.submit(with_tile(SPACES[self.name], changes, call), x)
            for changes in candidates
        ]
        for changes, job in zip(candidates, jobs, strict=True):
            error = job.exception()
            if error is None:
                yield changes, job.result()
            else:
                self.give(changes, error=why(error))
        use.close()

    def give(self, changes: Changes, **fields: Any) -> None:
        """A row."""
        subject = dataclasses.asdict(self.subject(changes))
        device = jax.devices()[0].device_kind
        self.take(rows.row(**subject, device=device, **fields))

    def best_of(self, candidates: Sequence[Changes]) -> Changes:
        """Time them in turns; the fastest. The first stands where none compiles."""
        x = programs.make_inputs(self.shape)
        ready = list(self.compile(candidates, x))
        bare = dataclasses.replace(self.subject({}), op=plan.MATMUL)
        product = jax.jit(programs.matmul).lower(x).compile()
        calls = {bare: lambda: product(x)} | {
            self.subject(changes): lambda program=program: program(x)
            for changes, program in ready
        }
        block = jax.block_until_ready
        times = take_turns(calls, block, self.sizes, lambda subject: None)
        T, D, V = self.shape
        peak = plan.FLOPS[plan.MATMUL] * T * D * V / times[bare].median / 1e12
        busy = clocks(calls[bare], block)
        for changes, _ in ready:
            found = times[self.subject(changes)]
            self.give(
                changes,
                seconds=found.median,
                flops=plan.FLOPS[self.op] * T * D * V,
                peak_tflops=peak,
                **found.fields(),
                **busy,
            )
        timed = [changes for changes, _ in ready] or [candidates[0]]
        return min(
            timed,
            key=lambda changes: times[self.subject(changes)].median if ready else 0.0,
        )

    def run(self, deadline: float) -> Changes:
        """Field by field, as long as there is time."""
        best: Changes = {}
        fields = dict(SPACES[self.name].fields)
        if self.op == plan.GRADIENT and self.name != "xla":
            fields = {**CHUNKS.fields, **fields}  # it decides most there
        for field, values in fields.items():
            if time.time() < deadline:
                tried = ({**best, field: x} for x in values)
                fit = (
                    changes for changes in tried if fits_the_chip(self.name, changes)
                )
                best = self.best_of([best, *fit])
        return best


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.search")
    parser.add_argument("--implementation", choices=tuple(SPACES))
    parser.add_argument("--limit", type=float, default=420.0, help="seconds")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny shapes")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Search, print the winners."""
    args = parse(argv)
    deadline = time.time() + args.limit
    sizes = gpu_sizes.REHEARSAL if args.rehearse else gpu_sizes.REAL
    output = args.output or rows.RESULTS / f"{RESULTS}.json"
    found: list[rows.Row] = []

    def take(row: rows.Row) -> None:
        found.append(row)
        rows.write_to(output, found)
        print(row["setting"], row["ms"], row.get("error", ""), flush=True)

    winners = []
    for shape in sizes.shapes[:2]:
        usable = programs.backends(shape)
        if not args.rehearse:
            usable = tuple(name for name in usable if name != "xla")
        wanted = [name for name in usable if args.implementation in (None, name)]
        for name in wanted:
            for op in OPS:
                one = Search(name=name, op=op, shape=shape, sizes=sizes, take=take)
                print(f"{name}, {op}, {shape}", flush=True)
                winners.append(
                    (name, op, shape, one.subject(one.run(deadline)).setting)
                )
    print(rows.table(("implementation", "op", "T, D, V", "fastest tile"), winners))
    return 0 if winners else 2


if __name__ == "__main__":
    sys.exit(main())
