"""The TPU kernels on the TPU that is here: verified, timed, beside the prediction.

    python -m bench.tpu.device [--rehearse] [--output FILE]

Errors against float64, which the host computes; then forward, and forward and gradient,
of ours and of plain JAX in turns with XLA's bare product `hidden @ head.T`, whose
TFLOP/s is what `pct_peak` is a share of. `predicted_ms` is what `bench.tpu.schedule
--compare` left in results/. Rows go to results/tpu_device.json as they come. Exits with
1 where a result is wrong or ours does not run, with 2 where there is no TPU.
`--rehearse` runs the same on a CPU at tiny shapes, the kernels in an interpreter.
"""

import argparse
import contextlib
import functools
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from bench import processes, rows
from bench.device import plan
from bench.tpu.compare import SHAPES
from bench.tpu.device_speed import IMPLEMENTATION, speed
from dpo_kernels import reference
from dpo_kernels.pallas_tpu import logprobs as pallas_tpu
from dpo_kernels.token_logprobs import token_logprobs
from dpo_kernels.verify import real as verify_real
from dpo_kernels.verify.cases import Case, Row, bound
from dpo_kernels.verify.real import RealCase

PROBE_S = 180.0  # a TPU may take its time to be found


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a run does."""

    cases: tuple[RealCase, ...]
    runs: int  # on the same inputs, for the same bits
    plan: plan.Plan


REAL = Sizes(
    # Those whose float64 logits a host computes in a minute or two.
    cases=tuple(
        case
        for case in verify_real.REAL_CASES
        if case.dtype == "bfloat16" and case.shape[0] <= 8192
    ),
    runs=5,
    plan=plan.Plan(shapes=SHAPES),
)
# The table of small shapes has every option; here it is enough that there are some.
SOME = Case(name="bias, padded", bias=True, valid_share=0.9)
REHEARSAL = Sizes(
    cases=(RealCase(shape=(24, 128, 200, 2**20), dtype="bfloat16", case=SOME),),
    runs=2,
    plan=plan.Plan(shapes=((16, 128, 200),), rounds=1, slice_s=1e-6, settle_s=0.0),
)


def check(one: RealCase, runs: int) -> rows.Row:
    """Errors of ours against float64, beside what plain JAX's allow; and its bits."""
    T, D, V, workspace = one.shape
    ours = functools.partial(
        token_logprobs, implementation=IMPLEMENTATION, workspace_bytes=workspace
    )
    inputs = verify_real.make_inputs(one)
    call = jax.jit(verify_real.evaluation(ours, one))
    first = jax.block_until_ready(call(inputs))
    same = all(
        bool(verify_real.identical(call(inputs), first)) for _ in range(runs - 1)
    )
    plain = jax.jit(verify_real.evaluation(reference.token_logprobs, one))(inputs)
    # A TPU's float64 is made of pairs of float32: the host's is the real one.
    host = jax.devices("cpu")[0]
    inputs, first, plain = jax.device_put((inputs, first, plain), host)
    with jax.enable_x64(True), jax.default_device(host):
        wide = verify_real.evaluation(verify_real.in_blocks, one)
        truth = jax.jit(lambda x: wide(verify_real.widened(x)))(inputs)
        found, allowed = (
            [verify_real.largest(x) for x in verify_real.relative_errors(out, truth)]
            for out in (first, plain)
        )
    bounds = [bound(error, one.dtype) for error in allowed]
    result = Row(
        implementation=IMPLEMENTATION,
        dtype=one.dtype,
        shape=(T, D, V),
        case=one.case.name,
        forward=found[0],
        forward_bound=bounds[0],
        gradient=found[1],
        gradient_bound=bounds[1],
    )
    print(result, "" if same else f" {runs} runs differ", flush=True)
    fields = ("forward", "forward_bound", "gradient", "gradient_bound")
    return rows.row(
        plan.VERIFY,
        IMPLEMENTATION,
        T=T,
        D=D,
        V=V,
        dtype=one.dtype,
        device=jax.devices()[0].device_kind,
        setting=one.case.name,
        passed=result.passed and same,
        runs=runs,
        same_bits=same,
        **{f"{name}_error": getattr(result, name) for name in fields[::2]},
        **{name: getattr(result, name) for name in fields[1::2]},
    )


def fits(one: RealCase) -> bool:
    """Whether plain JAX, which has the logits and their gradient, fits beside ours."""
    T, D, V, _ = one.shape
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    # Both in float32 at most, once in bfloat16; the head, its gradients, inputs.
    return limit is None or 10 * T * V + 10 * D * (T + V) <= limit


def show(results: list[rows.Row]) -> str:
    """The table of times."""
    keys = ("op", "implementation", "T", "D", "V", "setting", "ms", "min_ms", "tflops")
    keys += ("pct_peak", "predicted_ms", "measured_over_predicted", "error")
    timed = [row for row in results if row["op"] != plan.VERIFY]
    header = [key.replace("_", " ") for key in keys]
    header[keys.index("pct_peak")] = "% of the product"

    def text(row: rows.Row, key: str) -> Any:
        value = row.get(key)
        return "" if value is None else value

    return rows.table(header, [[text(row, key) for key in keys] for row in timed])


def good(row: rows.Row) -> bool:
    """Whether ours is right and runs; plain JAX may lack the memory."""
    return row["implementation"] != IMPLEMENTATION or (
        "error" not in row and row.get("passed", True)
    )


def run(sizes: Sizes, output: Path) -> list[rows.Row]:
    """Everything; each row is written as it comes."""
    results: list[rows.Row] = []

    def take(row: rows.Row) -> None:
        results.append(row)
        rows.write_to(output, results)

    for case in sizes.cases:
        if fits(case):
            take(check(case, sizes.runs))
        else:
            print(f"not verified, too large for plain JAX here: {case.shape[:3]}")
    for shape in sizes.plan.shapes:
        for row in speed(shape, sizes.plan):
            take(row)
    return results


def main(argv: list[str] | None = None) -> int:
    """Verify, time, print the table; 1 where ours is wrong, 2 without a TPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.tpu.device")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny shapes")
    parser.add_argument("--output", type=Path, help="default: results/tpu_device.json")
    args = parser.parse_args(argv)
    if not args.rehearse and processes.first_device({}, PROBE_S)[0] != "tpu":
        print(
            "no TPU that JAX can use was found; `python -m bench.tpu.device "
            "--rehearse` runs the same on a CPU, at tiny shapes"
        )
        return 2
    # The truth is computed on the host, whatever JAX_PLATFORMS says.
    jax.config.update("jax_platforms", "cpu" if args.rehearse else "tpu,cpu")
    output = args.output or rows.RESULTS / "tpu_device.json"
    if args.rehearse and not args.output:
        output = Path(tempfile.mkdtemp(prefix="bench-tpu-")) / "tpu_device.json"
    mode = pallas_tpu.interpreted() if args.rehearse else contextlib.nullcontext()
    with mode:
        results = run(REHEARSAL if args.rehearse else REAL, output)
    print(f"\n{show(results)}\nwrote {output}")
    return 0 if all(map(good, results)) else 1


if __name__ == "__main__":
    sys.exit(main())
