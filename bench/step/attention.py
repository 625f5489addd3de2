"""Each implementation of attention, compiled for devices that need not be here.

    python -m bench.step.attention [--target v6e:2x2]... \
        [--implementation splash]... [--form shared]

tokamax is left out where its package is not installed.

Value and gradients in bfloat16, in every form that an implementation claims, two rows
on each device (or on as many as rows are spread over), inside the typed `shard_map` of
the engine's step. A row of the table says what the program takes beside its arguments
and results (`temp_bytes`, of `memory_analysis()`) and, of the plain tiles, that no
scores are among it. Exits with 1 where something does not compile. Nothing runs.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from bench import processes, rows

TARGETS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "h200:4")
ROWS = 2  # of a device
CUDNN = 91300  # the version that programs are made for: 9.13


@dataclass(frozen=True, kw_only=True)
class Form:
    """What attention is asked for; heads are those of a model that asks for it."""

    name: str
    S: int
    N: int
    K: int
    H: int
    softcap: float | None = None
    window: int | None = None
    packed: bool = False
    shared: bool = False  # pairs begin alike
    longest: int | None = None
    sequence: int = 1  # devices that the tokens of a row are spread over

    @property
    def arrangement(self) -> Any:
        """Of its rows."""
        from engine.parallel.batch import Arrangement

        return Arrangement(
            packing=self.packed, share_prompt=self.shared, longest=self.longest
        )


LLAMA = functools.partial(Form, N=32, K=8, H=128)
GEMMA_2 = functools.partial(Form, N=16, K=8, H=256, softcap=50)
FORMS = (
    LLAMA(name="Llama 3.1 8B", S=2048),
    LLAMA(name="Llama 3.1 8B", S=8192),
    LLAMA(name="Llama 3.1 8B, packed", S=8192, packed=True),
    LLAMA(
        name="Llama 3.1 8B, packed, sequences of 2048",
        S=8192,
        packed=True,
        longest=2048,
    ),
    LLAMA(name="Llama 3.1 8B, shared", S=8192, packed=True, shared=True),
    LLAMA(name="Llama 3.1 8B, spread", S=65536, sequence=4),
    LLAMA(
        name="Llama 3.1 8B, spread and packed",
        S=65536,
        packed=True,
        sequence=4,
        longest=16384,
    ),
    GEMMA_2(name="Gemma 2 9B, sliding", S=8192, window=4096),
    GEMMA_2(name="Gemma 2 9B, packed", S=8192, packed=True),
    GEMMA_2(name="Gemma 2 9B, packed", S=1000, packed=True),
    GEMMA_2(name="Gemma 2 9B, packed", S=500, packed=True),
    Form(name="Gemma 3 1B, sliding", S=1000, N=4, K=1, H=256, window=512),
    Form(name="SmolLM2 135M, packed", S=640, N=9, K=3, H=64, packed=True),
)


def implementations(target: str) -> tuple[str, ...]:
    """Those that claim to run there, of what is installed."""
    if not target.startswith("h"):
        return "tiles", "splash"
    return ("tiles", "cudnn", *["tokamax"] * bool(find_spec("tokamax")))


def pretend_cudnn() -> None:
    """Answer what JAX would ask of a library and of a device that are absent.

    To compile takes no cuDNN: a program calls it when it runs.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    fused_attention_stablehlo.check_cudnn_version = lambda: CUDNN
    fused_attention_stablehlo.check_compute_capability = lambda _: True


def claimed(target: str, name: str, form: Form) -> bool:
    """Whether an implementation has a form, on devices of a target."""
    from engine.models import attention

    case = attention.Case(
        platform="gpu" if target.startswith("h") else "tpu",
        arrangement=form.arrangement,
        sequence=form.sequence,
        capability=(9, 0),
        head_dim=form.H,
        capped=form.softcap is not None,
    )
    return not attention.unsupported(name, case)


def program(target: str, name: str, form: Form) -> tuple[Any, tuple[Any, ...]]:
    """A function on the target's devices, and what it is called with."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from engine.models import attention
    from engine.parallel.batch import KeySpans
    from engine.parallel.row_parts import RowParts
    from engine.parallel.sharding import BATCH, DATA, SEQUENCE, make_mesh, place
    from engine.planning.devices import devices_of
    from engine.planning.targets import parse_target

    devices = devices_of(parse_target(target))
    mesh = make_mesh(-1, 1, 1, devices=devices, sequence=form.sequence)
    arrangement = form.arrangement

    def of_rows(*spans):
        return KeySpans(*spans) if arrangement.with_spans else None

    def value_and_gradient(query, key, value, *spans):
        parts, whole = RowParts.of(form.S), of_rows(*spans)
        own = attention.laid_out(name, parts.own(whole), arrangement)

        def total(query, key, value):
            out = attention.attend(
                name,
                query,
                parts.gather(key),
                parts.gather(value),
                scale=form.H**-0.5,
                softcap=form.softcap,
                windows=(form.window,),
                which=jnp.int32(0),
                spans=own,
                longest=form.longest,
                starts=parts.starts,
                key_begin=None if whole is None else jnp.asarray(whole.begin),
                device=devices[0],
            )
            return out.astype(jnp.float32).sum(), out

        return jax.grad(total, (0, 1, 2), has_aux=True)(query, key, value)

    batch: Any = PartitionSpec(BATCH)
    tokens: Any = PartitionSpec(BATCH, SEQUENCE)

    def array(spec: Any, *shape: int, dtype: Any = jnp.bfloat16) -> Any:
        size = (ROWS * mesh.shape[DATA], form.S, *shape)
        return jax.ShapeDtypeStruct(size, dtype, sharding=place(spec, mesh))

    keys, span = array(tokens, form.K, form.H), array(batch, dtype=jnp.int32)
    specs = (*[tokens] * 3, *[batch] * 3)
    sharded = jax.shard_map(
        value_and_gradient, mesh=mesh, in_specs=specs, out_specs=tokens
    )
    return sharded, (array(tokens, form.N, form.H), keys, keys, span, span, span)


def compile_form(target: str, name: str, form: Form) -> rows.Row:
    """Its row, which has `error` where it does not compile."""
    import jax

    start = time.perf_counter()
    facts: dict[str, Any] = {}
    function, arguments = program(target, name, form)
    try:
        memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
        assert memory is not None
        facts["temp_bytes"] = memory.temp_size_in_bytes
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        facts["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return rows.row(
        "attention, value and gradients",
        name,
        T=ROWS * form.S,
        D=form.N * form.H,
        V=0,
        dtype="bfloat16",
        device=f"{target}, ahead of time",
        form=form.name,
        **{k: v for k, v in asdict(form).items() if k != "name"},
        rows=ROWS,
        scores_bytes=4 * ROWS * form.N * form.S**2,
        **facts,
        compiler=_compiler(target),
        compile_s=round(time.perf_counter() - start, 1),
    )


def _compiler(target: str) -> str:
    package = "jax-cuda13-plugin" if target.startswith("h") else "libtpu"
    return f"{package} {version(package)}"


def show(results: Sequence[rows.Row]) -> str:
    """The table."""
    cells = [
        (
            row["device"].partition(",")[0],
            row["implementation"],
            row["form"],
            row["S"],
            f"{row['temp_bytes'] / rows.MIB:,.1f}" if "temp_bytes" in row else "",
            f"{row['scores_bytes'] / rows.MIB:,.0f}",
            row["compile_s"],
            row.get("error", "")[:100],
        )
        for row in results
    ]
    header = ("devices", "implementation", "form", "S", "temporaries MiB")
    header += ("all scores MiB", "compiled in s", "error")
    return rows.table(header, cells)


def main(argv: list[str] | None = None) -> int:
    """Print the table and write the rows; 1 where something does not compile."""
    parser = argparse.ArgumentParser(prog="python -m bench.step.attention")
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--implementation", action="append", default=[])
    parser.add_argument("--form", metavar="WORD", default="", help="whose name has it")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    def asked(name: str, form: str) -> bool:
        return args.form in form and name in (args.implementation or [name])

    if args.worker:
        pretend_cudnn()
        for name in implementations(args.worker):
            for form in FORMS:
                if asked(name, form.name) and claimed(args.worker, name, form):
                    processes.answer(compile_form(args.worker, name, form))
        return 0
    from engine.planning.targets import parse_target

    path = rows.RESULTS / "attention.json"
    chosen = args.target or TARGETS
    devices = [f"{target}, ahead of time" for target in chosen]
    results = [
        row
        for row in rows.read(path)
        if row["device"] not in devices or not asked(row["implementation"], row["form"])
    ]
    for target in chosen:
        environment = parse_target(target).environment
        words = ["--worker", target]
        words += [f"--implementation={name}" for name in args.implementation]
        words += [f"--form={args.form}"]
        for row in processes.ask_as_it_goes("bench.step.attention", words, environment):
            results.append(row)
            rows.write_to(path, results)
            print(json.dumps([row["device"], row["implementation"], row["form"]]))
    print(show(results))
    return 1 if any("error" in row for row in results) else 0


if __name__ == "__main__":
    sys.exit(main())
