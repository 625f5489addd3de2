"""Every implementation that this machine can run, against float64: a table.

    dpo verify [--implementation NAME] [--dtype NAME] [--quick | --real]

A row is one implementation, dtype, shape and set of options. Its error is the largest
over the outputs, or over the gradients, of max|x - truth| / max|truth|, where truth is
`reference.py` in float64 on the same inputs. The bound is a small multiple of the error
that plain JAX, `reference.py` in the same dtype, makes on the same inputs. `--real` has
the shapes of real models, for a device with the memory of an H200: `verify_real.py`.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_kernels import reference
from dpo_kernels.op.backends import BACKENDS, load_backend, supported_backends
from dpo_kernels.op.interface import LogitOptions, TokenLogprobs
from dpo_kernels.token_logprobs import token_logprobs
from dpo_kernels.verify import real as verify_real
from dpo_kernels.verify.cases import CASES, HEADER, Case, Row, Shape, bound, problem

DTYPES = ("bfloat16", "float16", "float32", "float64")
# (T, D, V, workspace): aligned; ragged, with V no multiple of any block, in one chunk
# and in several; tiny; as ragged as Hopper's copy engine takes it, D in 64s, V in 8s.
SHAPES = (
    (256, 128, 1024, 2**28),
    (129, 96, 1003, 2**28),
    (300, 64, 1003, 2**19),
    (67, 40, 1187, 2**18),
    (1, 8, 3, 2**28),
    (131, 64, 1000, 2**19),
)
QUICK_CASES = (CASES[0], CASES[-1])


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What one row of the table is computed from, on the host."""

    arrays: dict[str, np.ndarray]  # hidden, head, and bias where the case has one
    targets: np.ndarray
    cotangents: np.ndarray  # [2, T] of logprob and lse: per token, of either sign
    options: LogitOptions
    num_valid: int | None = None


def make_inputs(T: int, D: int, V: int, case: Case, dtype: str) -> Inputs:
    """Logits of standard deviation about 1: larger ones would hide a missing mask."""
    rng = np.random.default_rng([T, D, V])
    if case.offset:
        hidden, head = _with_offset(rng, T, D, V, case.offset)
    else:
        hidden, head = rng.normal(size=(T, D)), rng.normal(size=(V, D)) / D**0.5
    targets = rng.integers(0, V, size=T).astype(np.int32)
    arrays = {"hidden": hidden, "head": head}
    if case.bias:
        arrays["bias"] = rng.normal(size=V)
        gone = np.setdiff1d(np.arange(0, V, 7), targets)
        arrays["bias"][gone] = -np.inf
    num_valid = None
    if case.valid_share is not None:
        num_valid = int(case.valid_share * T)
        # Whatever is in a padding row must not be seen.
        hidden[num_valid:] = np.nan
        targets[num_valid:] = -1
    # The truth starts from what the dtype can hold, too.
    arrays = {name: x.astype(jnp.dtype(dtype)) for name, x in arrays.items()}
    return Inputs(
        arrays=arrays,
        targets=targets,
        cotangents=rng.normal(size=(2, T)),
        options=LogitOptions(softcap=case.softcap, scale=case.scale, stats=case.stats),
        num_valid=num_valid,
    )


def _with_offset(
    rng: np.random.Generator, T: int, D: int, V: int, offset: float
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden and head whose logits are `offset` and a few steps more or less.

    A step is what float32 resolves there, at least 1/2, and all products and sums are
    whole steps: so no dtype rounds a logit, and any error is of what comes after them.
    """
    step = max(0.5, offset * float(jnp.finfo(jnp.float32).eps))
    share = min(1.0, 2 / D)  # of entries that are not 0: two or so for each logit
    hidden = np.rint(rng.normal(size=(T, D)))
    signs = rng.choice([-1, 0, 1], size=(V, D), p=[share / 2, 1 - share, share / 2])
    head = step * signs
    hidden[:, 0] = head[:, 0] = offset**0.5
    return hidden, head


Op = Callable[..., TokenLogprobs]
Results = tuple[TokenLogprobs, dict[str, jax.Array]]


@functools.lru_cache(maxsize=32)
def program(op: Op, options: LogitOptions) -> Any:
    """Outputs and gradients of `op`, jitted; all but the options is an argument.

    So it is compiled once for each shape and dtype, whatever the values and counts.
    """

    def loss(arrays, targets, cotangents, num_valid) -> tuple[jax.Array, TokenLogprobs]:
        out = op(
            *(arrays["hidden"], arrays["head"], targets),
            bias=arrays.get("bias"),
            num_valid=num_valid,
            **asdict(options),
        )
        weights = cotangents.astype(out.lse.dtype)
        return (weights[0] * out.logprob).sum() + (weights[1] * out.lse).sum(), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def evaluate(op: Op, inputs: Inputs, dtype: str) -> Results:
    """Outputs and gradients of one implementation, with the inputs in `dtype`."""
    (_, out), grads = program(op, inputs.options)(
        {name: jnp.asarray(x, dtype) for name, x in inputs.arrays.items()},
        jnp.asarray(inputs.targets),
        jnp.asarray(inputs.cotangents),
        None if inputs.num_valid is None else jnp.int32(inputs.num_valid),
    )
    return out, grads


def relative_error(x: Any, truth: Any) -> float:
    """max|x - truth| / max|truth| over a tree; infinite where only one is NaN."""

    def leaf(x: Any, truth: Any) -> float:
        a, b = np.asarray(x, np.float64), np.asarray(truth, np.float64)
        if not a.size:
            return 0.0
        if not np.isfinite(a).all() or not np.isfinite(b).all():
            return 0.0 if np.array_equal(a, b) else float("inf")
        return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))

    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(truth), strict=True)
    return max((leaf(a, b) for a, b in pairs), default=0.0)


@functools.cache
def _truth(
    dtype: str, shape: Shape, case: Case
) -> tuple[Inputs, Results, tuple[float, float]]:
    """Inputs, what they give in float64, and the bounds: the same for every backend."""
    inputs = make_inputs(*shape[:3], case, dtype)
    op = reference.token_logprobs
    truth = evaluate(op, inputs, "float64")
    plain = truth if dtype == "float64" else evaluate(op, inputs, dtype)
    forward, gradient = map(relative_error, plain, truth)
    return inputs, truth, (bound(forward, dtype), bound(gradient, dtype))


def verify_case(implementation: str, dtype: str, shape: Shape, case: Case) -> Row:
    """Compute one row. Needs x64, for the truth."""
    T, D, V, workspace_bytes = shape

    # A new function, and so a new program: tests change what it is traced from.
    def op(*args: Any, **kwargs: Any) -> TokenLogprobs:
        kwargs |= {"workspace_bytes": workspace_bytes}
        return token_logprobs(*args, implementation=implementation, **kwargs)

    inputs, truth, bounds = _truth(dtype, shape, case)
    ours = evaluate(op, inputs, dtype)
    errors = list(map(relative_error, ours, truth))
    return Row(
        implementation=implementation,
        dtype=dtype,
        shape=(T, D, V),
        case=case.name,
        forward=errors[0],
        forward_bound=bounds[0],
        gradient=errors[1],
        gradient_bound=bounds[1],
    )


def rows(
    implementations: tuple[str, ...], dtypes: tuple[str, ...], quick: bool
) -> Iterator[Row]:
    """The table, a row at a time; without what a backend does not support here."""
    cases = QUICK_CASES if quick else CASES
    with jax.enable_x64(True):
        for name, dtype, shape, case in itertools.product(
            implementations, dtypes, SHAPES, cases
        ):
            if name in supported_backends(problem(dtype, shape, case)):
                yield verify_case(name, dtype, shape, case)


def _why_not(implementation: str, dtypes: tuple[str, ...]) -> str:
    """Why a backend that was asked for by name has no row."""
    try:
        load_backend(implementation, problem(dtypes[0], SHAPES[0], CASES[0]))
    except NotImplementedError as error:
        return str(error)
    raise AssertionError(f"{implementation} supports {dtypes[0]} and has no row")


def main(argv: list[str] | None = None) -> int:
    """Print the table; 0 if every row passes, else 1."""
    parser = argparse.ArgumentParser(
        prog="dpo verify",
        description="Check every implementation that can run here against float64.",
    )
    parser.add_argument("--implementation", choices=tuple(BACKENDS))
    parser.add_argument("--dtype", choices=DTYPES)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer option sets")
    size.add_argument(
        "--real", action="store_true", help="the shapes of real models; needs 100 GB"
    )
    args = parser.parse_args(argv)
    names = (args.implementation,) if args.implementation else tuple(BACKENDS)
    dtypes = (args.dtype,) if args.dtype else DTYPES
    if args.real:
        table = verify_real.rows(names, dtypes)
    else:
        table = rows(names, dtypes, args.quick)
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")
    print(HEADER)
    count = failed = 0
    for row in table:
        print(row, flush=True)
        count, failed = count + 1, failed + (not row.passed)
    if not count and args.implementation:
        print(_why_not(args.implementation, dtypes))
        return 2
    print(f"{count - failed} passed, {failed} failed")
    return 1 if failed else 0
