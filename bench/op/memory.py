"""Memory of `token_logprobs` and its gradient on devices that need not be here.

    python -m bench.op.memory [--target h200|h100|v6e] [--quick]

Compiles value-and-gradient ahead of time in bfloat16, reads the compiler's own account
of it (`memory_analysis()`), and prints a table with plain JAX beside it. Exits with 1
where our temporaries, which come on top of inputs and outputs, exceed the promise:

    bound   workspace_bytes + 4 T D (the float32 gradient of hidden) + 64 MiB

Plain JAX holds the logits: 4 T V bytes in float32, or half of that where the compiler
manages to keep them in bfloat16. Nothing runs here: that the results are right is what
the tests and `dpo verify` show.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import processes, rows

SHAPES = ((4096, 4096, 128256), (4096, 4096, 151936), (8192, 2304, 256000))
WORKSPACE = 256 * rows.MIB  # the default
AMPLE = 1024 * rows.MIB  # enough to keep most of the forward's exponentials
SPARE = 64 * rows.MIB
# What the engine asks for at each scored token, besides the log-probability.
STATS = ("entropy", "mean_logit", "top1")


@dataclass(frozen=True, kw_only=True)
class Target:
    """A device to compile for, in a process of its own with its own environment."""

    device: str
    environment: dict[str, str | None]  # None: not set
    topology: dict[str, str]
    target_config: Path | None = None
    compiler: str  # the package that holds it


def _hopper(name: str) -> Target:
    return Target(
        device=f"NVIDIA {name}, ahead of time",
        environment={"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "JAX_PLATFORMS": None},
        topology={"platform": "cuda", "topology_name": "", "topology": "1x1x8"},
        target_config=rows.ROOT / "engine" / "planning" / f"{name.lower()}.textproto",
        compiler="jax-cuda13-plugin",
    )


TARGETS = {
    "h200": _hopper("H200"),
    "h100": _hopper("H100"),
    "v6e": Target(
        device="TPU v6e, ahead of time",
        environment={"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"},
        topology={"platform": "tpu", "topology_name": "v6e:2x2"},
        compiler="libtpu",
    ),
}


REPORTED = ("h200", "v6e")  # an H100 has an H200's temporaries


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table; `call` returns (log-probability of each target, rest)."""

    name: str
    call: Callable[..., Any]  # of hidden, head, targets, num_valid
    workspace_bytes: int | None = None  # None: not ours


def cases() -> list[Case]:
    """Ours as anybody may call it and as the engine does, then plain JAX."""
    from bench.op.peers import PEERS
    from dpo_kernels import token_logprobs

    def ours(workspace_bytes: int) -> Callable:
        def call(hidden, head, targets, _):
            out = token_logprobs(hidden, head, targets, workspace_bytes=workspace_bytes)
            return out.logprob, out

        return call

    def padded(workspace_bytes: int) -> Callable:
        def call(hidden, head, targets, num_valid):
            out = token_logprobs(
                hidden,
                head,
                targets,
                num_valid=num_valid,
                stats=STATS,
                workspace_bytes=workspace_bytes,
            )
            return out.logprob, out

        return call

    def peer(f: Callable) -> Callable:
        return lambda hidden, head, targets, _: (f(hidden, head, targets), ())

    forms = {"dpo_kernels": ours, "dpo_kernels, num_valid and stats": padded}
    return [
        *(
            Case(
                name=name + ("" if size == WORKSPACE else f", {size // rows.MIB} MiB"),
                call=form(size),
                workspace_bytes=size,
            )
            for size in (WORKSPACE, AMPLE)
            for name, form in forms.items()
        ),
        *(Case(name=name, call=peer(f)) for name, f in PEERS.items()),
    ]


def device_mesh(target: Target) -> Any:
    """A mesh of one of the target's devices."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    options: dict[str, Any] = dict(target.topology)
    if target.target_config is not None:
        options["target_config"] = target.target_config.read_text()
    devices = topologies.get_topology_desc(**options).devices
    return jax.sharding.Mesh(np.array(devices[:1]), ("one",))


def compile_case(case: Case, mesh: Any, T: int, D: int, V: int) -> Any:
    """Loss, the case's other results, and both gradients, compiled for the mesh."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def loss(hidden, head, targets, dlogprob, num_valid):
        logprob, rest = case.call(hidden, head, targets, num_valid)
        return (logprob * dlogprob).sum(), rest

    value_and_grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    with jax.set_mesh(mesh):
        return value_and_grad.lower(
            array(jnp.bfloat16, T, D),
            array(jnp.bfloat16, V, D),
            array(jnp.int32, T),
            array(jnp.float32, T),
            array(jnp.int32),
        ).compile()


def bound_bytes(case: Case, T: int, D: int) -> int | None:
    """The promise; plain JAX makes none."""
    if case.workspace_bytes is None:
        return None
    return case.workspace_bytes + 4 * T * D + SPARE


def measure(
    target: Target, shapes: Sequence[tuple[int, int, int]]
) -> Iterator[rows.Row]:
    """A row for each shape and case; runs in the environment of the target."""
    mesh = device_mesh(target)
    for T, D, V in shapes:
        for case in cases():
            start = time.perf_counter()
            memory = compile_case(case, mesh, T, D, V).memory_analysis()
            yield rows.row(
                "token_logprobs, forward and gradient",
                case.name,
                T=T,
                D=D,
                V=V,
                dtype="bfloat16",
                device=target.device,
                compiler=f"{target.compiler} {version(target.compiler)}",
                peak_bytes=memory.peak_memory_in_bytes,
                temp_bytes=memory.temp_size_in_bytes,
                argument_bytes=memory.argument_size_in_bytes,
                output_bytes=memory.output_size_in_bytes,
                bound_bytes=bound_bytes(case, T, D),
                compile_s=round(time.perf_counter() - start, 1),
            )


def measure_elsewhere(name: str, quick: bool) -> list[rows.Row]:
    """`measure` in a process with the target's environment."""
    target, words = TARGETS[name], ["--worker", name] + ["--quick"] * quick
    try:
        return processes.ask("bench.op.memory", words, target.environment)
    except processes.ProcessError as error:
        sys.exit(
            f"compiling for {name} failed; is the package {target.compiler} installed? "
            f"{error}"
        )


def within(row: rows.Row) -> str:
    """Whether a row keeps the promise; plain JAX makes none."""
    if row["bound_bytes"] is None:
        return ""
    return "yes" if row["temp_bytes"] <= row["bound_bytes"] else "NO"


def show(results: Sequence[rows.Row]) -> str:
    """The table, in MiB."""

    def mib(value: int | None) -> str:
        return "" if value is None else f"{value / rows.MIB:,.0f}"

    return rows.table(
        ("device", "T", "D", "V", "implementation")
        + ("temporaries MiB", "bound MiB", "within", "peak MiB"),
        [
            (
                *(row[key] for key in ("device", "T", "D", "V", "implementation")),
                *(mib(row["temp_bytes"]), mib(row["bound_bytes"]), within(row)),
                mib(row["peak_bytes"]),
            )
            for row in results
        ],
    )


def main(argv: list[str] | None = None) -> int:
    """Print the table and write the rows; 1 where the bound is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m bench.op.memory")
    parser.add_argument("--target", choices=TARGETS, help="one only; writes no rows")
    parser.add_argument(
        "--quick", action="store_true", help="the first shape only; writes no rows"
    )
    parser.add_argument("--worker", choices=TARGETS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        shapes = SHAPES[: 1 if args.quick else None]
        processes.answer(list(measure(TARGETS[args.worker], shapes)))
        return 0
    results: list[rows.Row] = []
    for name in [args.target] if args.target else REPORTED:
        results += measure_elsewhere(name, args.quick)
    print(show(results))
    if not args.quick and not args.target:
        print("wrote", rows.write("memory", results).relative_to(rows.ROOT))
    return 1 if any(within(row) == "NO" for row in results) else 0


if __name__ == "__main__":
    sys.exit(main())
