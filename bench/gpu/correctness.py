"""Every backend against float64 at real shapes, run after run with the same bits.

Then the sums over sequences, and the small shapes of `dpo verify` as time goes on.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.device import plan
from bench.device.subject import Subject, why
from bench.gpu.pool import PulsingCompiler
from bench.gpu.worker import Context
from dpo_kernels import sequence_sums
from dpo_kernels.op import sums as sums_backends
from dpo_kernels.op.backends import BACKENDS
from dpo_kernels.op.compilation import Compiler
from dpo_kernels.op.devices import traced_device
from dpo_kernels.verify import real as verify_real
from dpo_kernels.verify import table as verify
from dpo_kernels.verify.real import ALL, REAL_CASES, CannotCompile, CaseCheck, RealCase

TINY = (12, 16, 301, 2**20)  # T, D, V, workspace: of a rehearsal
MARGIN_S = 3.0  # of the time left, under which no further small shape is begun


def cases(rehearse: bool) -> tuple[RealCase, ...]:
    """A tiny one in a rehearsal."""
    if rehearse:
        return (RealCase(shape=TINY, dtype="bfloat16", case=ALL),)
    return REAL_CASES


def subject_of(implementation: str, dtype: str, shape: Any, setting: str) -> Subject:
    """Of a row of the table."""
    T, D, V = shape[:3]
    return Subject(
        op=plan.VERIFY,
        implementation=implementation,
        T=T,
        D=D,
        V=V,
        dtype=dtype,
        setting=setting,
    )


def fields(row: verify.Row) -> dict[str, Any]:
    """What a row of `dpo verify` says, for JSON."""
    return {
        "forward_error": float(f"{row.forward:.3g}"),
        "forward_bound": float(f"{row.forward_bound:.3g}"),
        "gradient_error": float(f"{row.gradient:.3g}"),
        "gradient_bound": float(f"{row.gradient_bound:.3g}"),
        "passed": row.passed,
        "device": jax.devices()[0].device_kind,
    }


def real_subject(name: str, one: RealCase) -> Subject:
    """Of a backend's row for a real case; `float64` is blamed for the truth's death."""
    setting = f"{one.case.name}, {one.shape[3] // plan.MIB} MiB"
    return subject_of(name, one.dtype, one.shape, setting)


def to_check(context: Context, one: RealCase, use: Compiler) -> CaseCheck | None:
    """What is left of a case, its programs already on their way."""
    names = [
        name
        for name in verify_real.supported(one, tuple(BACKENDS))
        if context.wanted(real_subject(name, one))
    ]
    if not names or not context.wanted(real_subject("float64", one)):
        return None
    return CaseCheck(one, names, use)


def real(context: Context, check: CaseCheck) -> None:
    """A row for each backend."""
    context.trying(real_subject("float64", check.one))
    jobs = check.rows(context.plan.runs)
    for name, compute in zip(check.implementations, jobs, strict=True):
        subject = real_subject(name, check.one)
        context.trying(subject)
        try:
            found = compute()
        except CannotCompile as error:
            context.row(subject, error=why(error))
            continue
        context.row(
            subject,
            **fields(found.row) | {"passed": found.passed},
            runs=found.runs,
            same_bits=found.same,
        )


SUMS_BOUND = 1e-5  # of float32 sums of a thousand terms, relative to the largest


def sums(context: Context) -> None:
    """`sequence_sums` and its gradient, with empty sequences and of either sign."""
    T, R = (300, 7) if context.rehearse else (65536, 512)
    rng = np.random.default_rng(0)
    inner = rng.integers(0, T, R - 1)
    offsets = np.sort(np.concatenate([[0], inner, [T]])).astype(np.int32)
    offsets[R // 2] = offsets[R // 2 - 1]  # an empty one
    values, weights = rng.normal(size=(2, T)).astype(np.float32)
    dsums = rng.normal(size=R).astype(np.float32)
    ends = zip(offsets[:-1], offsets[1:], strict=True)
    truth = np.array([(values[a:b] * weights[a:b]).sum(dtype=float) for a, b in ends])
    dtruth = np.repeat(dsums, np.diff(offsets)) * weights.astype(float)
    for name in sums_backends.BACKENDS:
        subject = Subject(
            op="sequence_sums", implementation=name, T=T, D=R, V=0, dtype="float32"
        )
        problem = sums_backends.Problem(
            T=T,
            R=R,
            dtype=jnp.dtype("float32"),
            weights_dtype=jnp.dtype("float32"),
            device=traced_device(),
        )
        if not context.wanted(subject):
            continue
        try:
            sums_backends.load_backend(name, problem)
        except NotImplementedError:
            continue
        context.trying(subject)

        def loss(values: Any, name: str = name) -> tuple[Any, Any]:
            found, _ = sequence_sums(
                values,
                offsets=jnp.asarray(offsets),
                weights=jnp.asarray(weights),
                implementation=name,
            )
            return (found * dsums).sum(), found

        gradient = jax.jit(jax.grad(loss, has_aux=True))
        dvalues, found = gradient(jnp.asarray(values))
        error = verify.relative_error((found, dvalues), (truth, dtruth))
        context.row(
            subject,
            error_found=float(f"{error:.3g}"),
            passed=error <= SUMS_BOUND,
            note="D is the number of sequences",
        )


def small(context: Context) -> None:
    """`dpo verify --quick`, 16-bit dtypes first, until the time is over."""
    shapes = (TINY,) if context.rehearse else verify.SHAPES
    dtypes = verify.DTYPES[:1] if context.rehearse else verify.DTYPES[:3]
    with jax.enable_x64(True):
        for dtype in dtypes:
            for shape in shapes:
                for case in verify.QUICK_CASES:
                    for name in BACKENDS:
                        small_row(context, name, dtype, shape, case)


def small_row(context: Context, name: str, dtype: str, shape: Any, case: Any) -> None:
    """One, if it is supported, wanted, and there is time."""
    subject = subject_of(name, dtype, shape, case.name)
    problem = verify.problem(dtype, shape, case)
    if name not in verify.supported_backends(problem) or not context.wanted(subject):
        return
    if context.seconds_left() < MARGIN_S:
        return
    context.trying(subject)
    context.row(subject, **fields(verify.verify_case(name, dtype, shape, case)))


def run(context: Context) -> None:
    """A task for each real case, then the sums, then the small shapes."""
    use = PulsingCompiler(context.pulse)
    checks = {f"verify {one}": one for one in cases(context.rehearse)}
    started = {
        name: to_check(context, one, use)
        for name, one in checks.items()
        if not context.is_done(name)
    }
    others = {"verify sums": sums, "verify small shapes": small}
    for name in context.tasks([*checks, *others]):
        if name in others:
            others[name](context)
            continue
        # Taken out: its arrays and programs go when it is through.
        check = started.pop(name)
        if check is not None:
            real(context, check)
