"""Attention's implementations on one GPU: a layer's, forward and with its gradients.

    python -m bench.gpu.attention [--rehearse] [--output FILE]

Llama-3.1-8B's heads in bfloat16, padded rows of 2,048 and 8,192 tokens, and a packed
row of four sequences: the plain tiles, cuDNN's (padded rows only), and the kernels of
tokamax where it is installed, in turns.

    tflops        of the products that causality leaves: 2 of the forward, and 5 more of
                  the gradients, 2 H each for a pair of a query and a key that it sees
    relative_error  of the value and of each gradient, beside the tiles' in float32:
                  the largest difference, of the largest number
    tiles_error   what the tiles in bfloat16 are off by

Exits with 1 where an error is 8 times the tiles' own, with 2 where there is no GPU. An
implementation that fails is a row with `error`. `--rehearse` runs on a CPU, at tiny
shapes, where there are tiles alone.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import rows
from bench.device.plan import Plan
from bench.device.subject import Subject, why
from bench.device.timing import take_turns
from bench.gpu import quick, sizes
from bench.gpu.clocks import clocks
from dpo_kernels.op.devices import of_jax
from engine.models import attention
from engine.parallel.batch import PADDED, Arrangement, KeySpans

FORWARD, GRADIENTS = "attention", "attention, with gradients"
OPS = {FORWARD: 2, GRADIENTS: 7}  # and the products of each
ALLOWED = 8
# Of a library's kernel: the others' rows are wanted none the less.
FAILURES = RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError


@dataclass(frozen=True)
class Form:
    """Rows of tokens."""

    name: str
    rows: int
    length: int
    sequences: int = 1  # in each row, of equal lengths
    heads: tuple[int, int, int] = (32, 8, 128)  # of queries, of keys, and their size

    @property
    def products(self) -> int:
        """FLOPs of one product over all pairs of a query and a key that it sees."""
        own = self.length // self.sequences
        pairs = self.rows * self.sequences * own * (own + 1) // 2
        return 2 * pairs * self.heads[0] * self.heads[2]


REAL = (
    Form("padded", 4, 2048),
    Form("padded", 1, 8192),
    Form("packed", 1, 8192, sequences=4),
)
REHEARSAL = tuple(
    Form(name, 1, 96, sequences, heads=(4, 2, 16))
    for name, sequences in (("padded", 1), ("packed", 3))
)


def implementations(form: Form) -> dict[str, Callable[..., Any]]:
    """Those that can be had for the form, by name: of query, key and value."""
    device, scale = jax.devices()[0], form.heads[2] ** -0.5
    arrangement, spans = PADDED, None
    if form.sequences > 1:
        arrangement = Arrangement(packing=True)
        own = form.length // form.sequences
        one = KeySpans.of_groups([(0, own)] * form.sequences, form.length)
        spans = KeySpans(*(jnp.tile(jnp.asarray(x), (form.rows, 1)) for x in one))
    known = of_jax(device)
    case = attention.Case(
        platform=known.platform,
        arrangement=arrangement,
        capability=known.capability,
        head_dim=form.heads[2],
    )
    return {
        name: functools.partial(
            attention.attend,
            name,
            scale=scale,
            softcap=None,
            windows=(None,),
            which=jnp.int32(0),
            spans=spans,
            longest=None,
            device=device,
        )
        for name in attention.IMPLEMENTATIONS
        if not attention.unsupported(name, case)
    }


def programs(attend: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """By operation, of query, key, value and the gradient of the result."""

    def with_gradients(query: Any, key: Any, value: Any, dout: Any) -> Any:
        out, pullback = jax.vjp(attend, query, key, value)
        return out, *pullback(dout)

    return {FORWARD: lambda *x: attend(*x[:3]), GRADIENTS: with_gradients}


def errors(
    tiles: Callable[..., Any], inputs: list[Any], outs: dict[str, Any]
) -> dict[str, float]:
    """Of each implementation's value and gradients, the largest."""
    wide = [x.astype(jnp.float32) for x in inputs]
    with jax.default_matmul_precision("highest"):
        truth = jax.jit(programs(tiles)[GRADIENTS])(*wide)

    def off(out: Any) -> float:
        pairs = [(x.astype(jnp.float32), y) for x, y in zip(out, truth, strict=True)]
        return max(float(abs(x - y).max() / abs(y).max()) for x, y in pairs)

    return {name: off(out) for name, out in outs.items()}


def measure(form: Form, size: Plan, give: Callable[[rows.Row], None]) -> bool:
    """Rows of a form; whether all are right."""
    (N, K, H), rng = form.heads, np.random.default_rng(0)
    shapes = [(form.rows, form.length, heads, H) for heads in (N, K, K, N)]
    inputs = [jnp.asarray(rng.standard_normal(x), jnp.bfloat16) for x in shapes]
    calls, outs, whys, had = {}, {}, {}, implementations(form)
    for name, attend in had.items():
        for op, program in programs(attend).items():
            subject = Subject(op=op, implementation=name, **_shape(form))
            try:
                compiled = jax.jit(program).lower(*inputs).compile()
                out = jax.block_until_ready(compiled(*inputs))
                if op == GRADIENTS:
                    outs[name] = out
                calls[subject] = functools.partial(compiled, *inputs)
            except FAILURES as error:
                whys[subject] = why(error)
    found = errors(had["tiles"], inputs, outs)
    times = take_turns(calls, jax.block_until_ready, size, lambda _: None)
    facts = {"form": form.name, "rows": form.rows, "sequences": form.sequences}
    facts |= {"device": jax.devices()[0].device_kind}
    for subject in [*calls, *whys]:
        more: dict[str, Any] = {"error": whys.get(subject)}
        if subject in times:
            more = {
                "seconds": times[subject].median,
                "flops": OPS[subject.op] * form.products,
                "relative_error": found.get(subject.implementation),
                "tiles_error": found.get("tiles"),
                **times[subject].fields(),
                **clocks(calls[subject], jax.block_until_ready),
            }
        name = subject.implementation
        give(
            rows.row(subject.op, name, **_shape(form), dtype="bfloat16", **facts | more)
        )
    return not whys and max(found.values()) <= ALLOWED * found["tiles"]


def _shape(form: Form) -> dict[str, Any]:
    return {"T": form.rows * form.length, "D": form.heads[0] * form.heads[2], "V": 0}


def main(argv: list[str] | None = None) -> int:
    """Print and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.attention")
    parser.add_argument("--output", type=Path, help="lines of JSON, added to")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny")
    args = parser.parse_args(argv)
    if not quick.has_gpu(rehearse=args.rehearse):
        return 2
    path = Path(os.devnull) if args.rehearse else rows.RESULTS / "gpu_attention.jsonl"

    def give(row: rows.Row) -> None:
        quick.give(row, args.output or path)

    size = sizes.REHEARSAL if args.rehearse else sizes.REAL
    forms = REHEARSAL if args.rehearse else REAL
    return 0 if all([measure(form, size, give) for form in forms]) else 1


if __name__ == "__main__":
    sys.exit(main())
