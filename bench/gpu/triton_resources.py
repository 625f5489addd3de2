"""What the Triton kernels take of an absent GPU: registers, spills, shared memory.

    python -m bench.gpu.triton_resources [--kind "NVIDIA H200"] [--dtype bfloat16]

Records the launches that `dpo_kernels.triton.logprobs` makes for a device, compiles
each ahead of time, and reads the assembler's account and the machine code. Compiled is
not run: nothing here says how fast a kernel is.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

# A device of each capability that has a tile of its own, or its own instructions, and
# how much of the shared memory one block may have, in KiB.
SHARED_KIB = {
    "NVIDIA A100-SXM4-80GB": 163,
    "NVIDIA A10": 99,
    "NVIDIA L4": 99,
    "NVIDIA H100 80GB HBM3": 227,
    "NVIDIA H200": 227,
    "NVIDIA B200": 227,
    "NVIDIA RTX PRO 6000": 99,
}
SHAPE = (4096, 4096, 128256)
CHUNK_V = 4096  # about what the backward cuts out of SHAPE in 256 MiB
RAGGED_SHAPE, RAGGED_CHUNK_V = (4001, 4104, 100003), 4003
NO_SPILLS = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")  # the tiles were chosen for them
STATS = ("entropy", "mean_logit", "top1")  # what the engine asks for
_TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One call of a kernel, as the backend makes it."""

    kernel: str
    pointers: tuple[str, ...]  # dtypes of inputs and outputs
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel with some of its options."""

    name: str
    make: Callable[[str], Launch]  # of the dtype


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a thread block of a compiled kernel takes."""

    kind: str
    case: str
    dtype: str
    registers: int  # of a thread
    stack_bytes: int  # of a thread
    spills: int  # instructions that store registers to memory, or load them back
    shared_bytes: int
    matrix: str  # the instructions that multiply, and how many there are
    instructions: int

    def __str__(self) -> str:
        """One line, aligned with `HEADER`."""
        return (
            f"{self.kind:<23}{self.dtype:<10}{self.case:<16}{self.registers:>6}"
            f"{self.stack_bytes:>7}{self.spills:>8}{self.shared_bytes:>9}"
            f"{self.instructions:>8}  {self.matrix}"
        )


HEADER = (
    f"{'device':<23}{'dtype':<10}{'kernel':<16}{'regs':>6}{'stack':>7}{'spills':>8}"
    f"{'shared':>9}{'instr':>8}  matrix instructions"
)


def forward_case(name: str, shape=SHAPE, *, padded=False, bias=False, keep_v=0, **rest):
    """`forward_partials`; `rest` are the fields of `LogitOptions`."""
    T, D, V = shape

    def call(hidden, head, targets, bias, num_valid):
        from dpo_kernels.triton import logprobs as triton

        return triton.forward_partials(
            *(hidden, head, targets, bias, num_valid),
            options=_options(rest),
            workspace_bytes=0,
            keep_v=keep_v,
        )

    def make(dtype: str) -> Launch:
        return _record(
            call,
            *(_array(dtype, T, D), _array(dtype, V, D), _array("int32", T)),
            _array(dtype, V) if bias else None,
            _array("int32") if padded else None,
        )

    return Case(name=name, make=make)


def dlogits_case(name: str, shape=SHAPE, chunk=CHUNK_V, *, bias=False, **rest) -> Case:
    """`dlogits` of a chunk of the vocabulary."""
    T, D, _ = shape

    def call(*arrays):
        from dpo_kernels.triton import logprobs as triton

        return triton.dlogits(*arrays, options=_options(rest))

    def make(dtype: str) -> Launch:
        return _record(
            call,
            *(_array(dtype, T, D), _array(dtype, chunk, D), _array("int32", T)),
            _array(dtype, chunk) if bias else None,
            *[_array("float32", T)] * 3,
        )

    return Case(name=name, make=make)


_EVERYTHING = {"bias": True, "softcap": 30.0, "scale": 0.7}
_EVERY_STAT = ("entropy", "collision", "mean_logit", "top1")
_ENGINE = {"padded": True, "keep_v": 16384, "stats": STATS}
_ALL = _EVERYTHING | {"padded": True, "keep_v": 16385, "stats": _EVERY_STAT}
CASES = (
    forward_case("forward"),
    forward_case("forward, engine", **_ENGINE),
    forward_case("forward, Gemma", **_ENGINE, softcap=30.0),
    forward_case("forward, all", **_ALL),
    forward_case("forward, ragged", RAGGED_SHAPE, **_ALL),
    dlogits_case("dlogits"),
    dlogits_case("dlogits, all", **_EVERYTHING),
    dlogits_case("dlogits, ragged", RAGGED_SHAPE, RAGGED_CHUNK_V, **_EVERYTHING),
)


def _options(fields: dict[str, Any]) -> Any:
    from dpo_kernels.op.interface import LogitOptions

    return LogitOptions(**fields)


def _array(dtype: str, *shape: int) -> Any:
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)


def _record(call: Callable[..., Any], *arguments: Any) -> Launch:
    """The one launch that `call` makes."""
    import jax
    import jax.numpy as jnp

    from dpo_kernels.triton import logprobs as triton

    found: list[Launch] = []

    def traced(*arrays):
        # A function of its own: JAX would remember what it traced for another tile.
        call(*arrays)

    def launch(kernel, arrays, out, tile, programs, constants):
        assert 0 < programs < 2**31
        found.append(
            Launch(
                kernel=kernel,
                pointers=tuple(str(x.dtype) for x in (*arrays, *out)),
                constants=constants
                | {
                    "BLOCK_T": tile.block_t,
                    "BLOCK_V": tile.block_v,
                    "BLOCK_D": tile.block_d,
                    "GROUP_T": tile.group_t,
                },
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
            )
        )
        return tuple(jnp.zeros(x.shape, x.dtype) for x in out)

    with mock.patch.object(triton, "_launch", launch):
        jax.eval_shape(traced, *arguments)
    (one,) = found
    return one


def resources(case: Case, dtype: str, kind: str) -> Resources:
    """Compile one kernel for a device of that name."""
    import jax
    import triton
    from jax.sharding import AbstractDevice, AbstractMesh
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dpo_kernels.op.devices import capability_of
    from dpo_kernels.triton import kernels as triton_kernels

    device = AbstractDevice(device_kind=kind, num_cores=1, platform="gpu")
    mesh = AbstractMesh((1,), ("one",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        launch = case.make(dtype)
    capability = capability_of(kind)
    assert capability is not None, kind
    function = getattr(triton_kernels, launch.kernel)
    names = function.arg_names
    types = dict(zip(names, map(_TYPES.__getitem__, launch.pointers), strict=False))
    source = ASTSource(
        function,
        types | dict.fromkeys(launch.constants, "constexpr"),
        {(names.index(name),): value for name, value in launch.constants.items()},
        # As jax-triton says of every array.
        {(i,): [["tt.divisibility", 16]] for i in range(len(types))},
    )
    with tempfile.TemporaryDirectory() as scratch, knobs.cache.scope():
        knobs.cache.dir = scratch
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32),
            options={
                "num_warps": launch.num_warps,
                "num_stages": launch.num_stages,
                "enable_fp_fusion": True,
            },
        )
        return _read(compiled, Path(scratch) / "kernel.cubin", (kind, case.name, dtype))


def _read(compiled: Any, path: Path, key: tuple[str, str, str]) -> Resources:
    """What the assembler says of a kernel, and what its code shows."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path.write_bytes(compiled.asm["cubin"])

    def run(tool: str, *arguments: str) -> str:
        command = [str(tools / tool), *arguments, str(path)]
        return subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+)", run("cuobjdump", "-res-usage"))
    assert usage is not None, "cuobjdump says what a kernel takes"
    code = run("nvdisasm", "-c")
    found = re.findall(r"\b((?:UTC)?[A-Z]?G?MMA)\b", code)
    kinds = {name: found.count(name) for name in sorted(set(found))}
    return Resources(
        kind=key[0],
        case=key[1],
        dtype=key[2],
        registers=int(usage[1]),
        stack_bytes=int(usage[2]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared_bytes=compiled.metadata.shared,
        matrix=", ".join(f"{count} {name}" for name, count in kinds.items()),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
    )


def table(
    kinds: Sequence[str], dtypes: Sequence[str], cases: Sequence[Case] = CASES
) -> Iterator[Resources]:
    """Every kernel on every device."""
    for kind, dtype, case in itertools.product(kinds, dtypes, cases):
        yield resources(case, dtype, kind)


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 if a kernel asks for too much, or spills on Hopper."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.triton_resources")
    parser.add_argument("--kind", choices=SHARED_KIB)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    args = parser.parse_args(argv)
    print(HEADER)
    worst = 0
    for row in table(
        (args.kind,) if args.kind else tuple(SHARED_KIB),
        (args.dtype,) if args.dtype else ("bfloat16", "float16", "float32"),
    ):
        print(row, flush=True)
        spills = row.spills if row.kind in NO_SPILLS else 0
        worst = max(worst, spills, row.shared_bytes - 1024 * SHARED_KIB[row.kind])
    return 1 if worst > 0 else 0


if __name__ == "__main__":
    sys.exit(main())
