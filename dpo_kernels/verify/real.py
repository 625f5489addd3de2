"""`dpo verify --real`: the shapes of real models, on a device that can hold them.

As `verify.py`, but inputs are made, and errors taken, on the device, and the truth is
summed over blocks of rows: float64 logits of every row at once would not fit.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dpo_kernels import reference
from dpo_kernels.op.backends import supported_backends
from dpo_kernels.op.compilation import Compiler
from dpo_kernels.op.interface import STATS, TokenLogprobs
from dpo_kernels.token_logprobs import token_logprobs
from dpo_kernels.verify.cases import CASES, Case, Row, Shape, bound, problem

MIB = 2**20
# Rows of one float64 block: 1 GB of logits at V = 128256.
BLOCK_T = 1024
PLAIN, ALL = CASES[0], CASES[-1]
BIAS = Case(name="bias", bias=True, stats=STATS)
SOFTCAP = Case(name="softcap", softcap=30.0, stats=STATS)


@dataclass(frozen=True, kw_only=True)
class RealCase:
    """One line of inputs; each backend that supports it gets a row."""

    shape: Shape
    dtype: str
    case: Case


# The most telling first: a run may be cut short. One option at a time before all at
# once, whose programs, with padding, take the longest to compile. With 2 GiB the
# exponentials of all 4096 rows are kept; 3000 rows fill no block; 256000 is Gemma's
# vocabulary.
REAL_CASES = tuple(
    RealCase(shape=shape, dtype=dtype, case=case)
    for shape, dtype, case in (
        ((4096, 4096, 128256, 256 * MIB), "bfloat16", PLAIN),
        ((4096, 4096, 128256, 256 * MIB), "bfloat16", BIAS),
        ((4096, 4096, 128256, 2048 * MIB), "float16", PLAIN),
        ((8192, 2304, 256000, 256 * MIB), "bfloat16", SOFTCAP),
        ((4096, 4096, 128256, 2048 * MIB), "bfloat16", ALL),
        ((4096, 4096, 128256, 256 * MIB), "float16", ALL),
        ((4096, 4096, 128256, 256 * MIB), "float32", ALL),
        ((3000, 4096, 151936, 256 * MIB), "bfloat16", ALL),
        ((16384, 8192, 128256, 256 * MIB), "bfloat16", PLAIN),
    )
)


class Inputs(NamedTuple):
    """On the device, in the dtype under test."""

    arrays: dict[str, Array]  # hidden, head, and bias where the case has one
    targets: Int[Array, " T"]
    cotangents: Float[Array, "2 T"]  # of logprob and lse, float32
    num_valid: Int[Array, ""]  # T where the case has no padding


@functools.partial(jax.jit, static_argnums=(1, 2))
def normal(
    key: Array, shape: tuple[int, ...], dtype: str, scale: Array | float = 1.0
) -> Array:
    """Drawn in float32: 16-bit normals would have few distinct values."""
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def make_inputs(one: RealCase) -> Inputs:
    """Logits of standard deviation about 1, as `verify.make_inputs` has them."""
    (T, D, V, _), case, dtype = one.shape, one.case, one.dtype
    keys = jax.random.split(jax.random.key(T + D + V), 5)
    targets = jax.random.randint(keys[2], (T,), 0, V, jnp.int32)
    arrays = {
        "hidden": normal(keys[0], (T, D), dtype),
        "head": normal(keys[1], (V, D), dtype, D**-0.5),
    }
    if case.bias:
        gone = jnp.arange(V, dtype=jnp.int32) % 7 == 0
        gone = gone.at[targets].set(False)
        bias = normal(keys[3], (V,), dtype)
        arrays["bias"] = jnp.where(gone, jnp.asarray(-jnp.inf, dtype), bias)
    num_valid = T if case.valid_share is None else int(case.valid_share * T)
    if num_valid < T:
        # Whatever is in a padding row must not be seen.
        arrays["hidden"] = arrays["hidden"].at[num_valid:].set(jnp.nan)
        targets = targets.at[num_valid:].set(-1)
    return Inputs(
        arrays=arrays,
        targets=targets,
        cotangents=normal(keys[4], (2, T), "float32"),
        num_valid=jnp.int32(num_valid),
    )


Results = tuple[TokenLogprobs, dict[str, Array]]
Op = Callable[..., TokenLogprobs]


def evaluation(op: Op, one: RealCase) -> Callable[[Inputs], Results]:
    """Outputs and gradients, to be compiled; inputs in whatever dtype they come."""
    padded = one.case.valid_share is not None
    options = {"softcap": one.case.softcap, "scale": one.case.scale}

    def call(inputs: Inputs) -> Results:
        def loss(arrays: dict[str, Array]) -> tuple[Array, TokenLogprobs]:
            out = op(
                arrays["hidden"],
                arrays["head"],
                inputs.targets,
                bias=arrays.get("bias"),
                num_valid=inputs.num_valid if padded else None,
                stats=one.case.stats,
                **options,
            )
            weights = inputs.cotangents.astype(out.lse.dtype)
            return (weights[0] * out.logprob + weights[1] * out.lse).sum(), out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(inputs.arrays)
        return out, grads

    return call


def in_blocks(hidden: Array, head: Array, targets: Array, **kwargs: Any):
    """`reference.token_logprobs` a block of rows at a time, recomputed backwards."""
    T, D = hidden.shape
    rows = max(size for size in range(1, min(T, BLOCK_T) + 1) if T % size == 0)
    num_valid = kwargs.pop("num_valid")
    num_valid = jnp.asarray(T) if num_valid is None else num_valid

    @jax.checkpoint
    def block(x: tuple[Array, Array, Array]) -> TokenLogprobs:
        hidden, targets, start = x
        left = num_valid - start
        return reference.token_logprobs(hidden, head, targets, num_valid=left, **kwargs)

    starts = jnp.arange(0, T, rows)
    blocks = (hidden.reshape(-1, rows, D), targets.reshape(-1, rows), starts)
    out = lax.map(block, blocks)
    return jax.tree.map(lambda x: x.reshape(T), out)


def widened(inputs: Inputs) -> Inputs:
    """The same values in float64."""
    wide = {name: x.astype(jnp.float64) for name, x in inputs.arrays.items()}
    # Indices are 64 bits wide, too, under x64.
    return inputs._replace(arrays=wide, num_valid=inputs.num_valid.astype(jnp.int_))


@jax.jit
def relative_errors(x: Any, truth: Any) -> Any:
    """As `verify.relative_error`, a number for each leaf, on the device."""

    def leaf(x: Array, truth: Array) -> Array:
        a, b = x.astype(jnp.float64), truth.astype(jnp.float64)
        finite = jnp.isfinite(a).all() & jnp.isfinite(b).all()
        scale = jnp.maximum(jnp.abs(b).max(), 1e-30)
        return jnp.where(finite, jnp.abs(a - b).max() / scale, jnp.inf)

    return jax.tree.map(leaf, x, truth)


def largest(errors: Any) -> float:
    """The largest of a tree of errors."""
    return max(map(float, jax.tree.leaves(errors)))


@jax.jit
def identical(a: Any, b: Any) -> Array:
    """Whether two trees have the same bits; NaNs are equal to themselves."""

    def leaf(a: Array, b: Array) -> Array:
        if jnp.issubdtype(a.dtype, jnp.floating):
            unsigned = jnp.dtype(f"uint{8 * a.dtype.itemsize}")
            a, b = (lax.bitcast_convert_type(x, unsigned) for x in (a, b))
        return (a == b).all()

    return jnp.stack(jax.tree.leaves(jax.tree.map(leaf, a, b))).all()


class Checked(NamedTuple):
    """A row, and how many runs on the same inputs gave the bits of the first."""

    row: Row
    runs: int
    same: int

    @property
    def passed(self) -> bool:
        """Errors within bounds, and every run the same."""
        return self.row.passed and self.same == self.runs


def supported(one: RealCase, implementations: Sequence[str]) -> list[str]:
    """The implementations that support this case on this device."""
    found = supported_backends(problem(one.dtype, one.shape, one.case))
    return [name for name in implementations if name in found]


class CannotCompile(RuntimeError):
    """An implementation that says it supports a case and does not compile."""


class CaseCheck:
    """One case's programs, compiled while others run, and its rows."""

    def __init__(self, one: RealCase, implementations: Sequence[str], use: Compiler):
        self.one, self.implementations = one, tuple(implementations)
        shapes = jax.eval_shape(lambda: make_inputs(one))

        def ours(name: str) -> Future:
            op = functools.partial(
                token_logprobs, implementation=name, workspace_bytes=one.shape[3]
            )
            # Without x64, as it is trained with: an index that is 64 bits wide under
            # x64 is a bug that the table of small shapes shows.
            return use.submit(evaluation(op, one), shapes)

        wide = evaluation(in_blocks, one)
        self._truth = use.submit(lambda x: wide(widened(x)), shapes, x64=True)
        self._plain = use.submit(evaluation(reference.token_logprobs, one), shapes)
        self._ours = {name: ours(name) for name in self.implementations}

    def rows(self, runs: int = 1) -> Iterator[Callable[[], Checked]]:
        """For each implementation, what computes its row.

        A caller that wants to know what was being tried when a process died can say so
        between one and the next.
        """
        inputs = make_inputs(self.one)
        truth = self._truth.result()(inputs)
        plain = self._plain.result()(inputs)
        with jax.enable_x64(True):
            forward, gradient = map(largest, relative_errors(plain, truth))
        del plain
        bounds = [bound(error, self.one.dtype) for error in (forward, gradient)]
        for name in self.implementations:
            yield functools.partial(self._row, name, inputs, truth, bounds, runs)

    def _row(
        self, name: str, inputs: Inputs, truth: Results, bounds: list[float], runs: int
    ) -> Checked:
        failure = self._ours[name].exception()
        if failure is not None:
            raise CannotCompile(f"{name}: {failure}") from failure
        call = self._ours[name].result()
        first = call(inputs)
        same = 1 + sum(bool(identical(call(inputs), first)) for _ in range(runs - 1))
        with jax.enable_x64(True):
            errors = list(map(largest, relative_errors(first, truth)))
        row = Row(
            implementation=name,
            dtype=self.one.dtype,
            shape=self.one.shape[:3],
            case=self.one.case.name,
            forward=errors[0],
            forward_bound=bounds[0],
            gradient=errors[1],
            gradient_bound=bounds[1],
        )
        return Checked(row=row, runs=runs, same=same)


def rows(
    implementations: Sequence[str],
    dtypes: Sequence[str],
    cases: Sequence[RealCase] = REAL_CASES,
) -> Iterator[Row]:
    """The table, a row at a time."""
    use = Compiler()
    checks = [
        CaseCheck(one, names, use)
        for one in cases
        if one.dtype in dtypes
        for names in [supported(one, implementations)]
        if names
    ]
    try:
        while checks:
            for compute in checks.pop(0).rows():
                yield compute().row
    finally:
        use.close()
