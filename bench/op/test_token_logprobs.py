"""Forward and gradient of `token_logprobs` on the CPU, in turns with plain JAX.

    flops   ours 8 T D V (logits twice, two gradients), plain JAX 6 T D V (logits once)
    bytes   plain JAX moves the 4 T V bytes of the logits to memory and back several
            times; ours holds a tile of them in the cache

Each round times every implementation once, so that what else the machine does meets all
of them alike; a matrix product beside them gives the peak that rows are a share of.
Under `--benchmark-disable` only the results are compared.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from bench import rows
from bench.op.peers import PEERS
from dpo_kernels import reference, token_logprobs

T, D, V = 1024, 256, 32000
ROUNDS = 25
OURS, PEAK = "dpo_kernels", "matrix product"
# A share of a gradient's largest element: float32 sums of V terms in another order.
TOLERANCE = 2e-5

Call = Callable[[], Any]


def ours(hidden, head, targets, num_valid):
    """The op as the trainer calls it."""
    return token_logprobs(hidden, head, targets, num_valid=num_valid).logprob


def padded(peer: Callable) -> Callable:
    """Plain JAX with rows of padding: they are computed, and then count for nothing."""

    def call(hidden, head, targets, num_valid):
        logprob = peer(hidden, head, targets)
        if num_valid is None:
            return logprob
        return jnp.where(jnp.arange(targets.shape[0]) < num_valid, logprob, 0.0)

    return call


IMPLEMENTATIONS = {OURS: ours} | {name: padded(f) for name, f in PEERS.items()}


class Inputs(NamedTuple):
    """What every implementation is given."""

    hidden: jax.Array
    head: jax.Array
    targets: jax.Array
    dlogprob: jax.Array  # a cotangent for each token, of either sign


def make_inputs() -> Inputs:
    """Logits of standard deviation 1."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(T, D)).astype(np.float32)
    head = (rng.normal(size=(V, D)) / D**0.5).astype(np.float32)
    targets = rng.integers(0, V, size=T).astype(np.int32)
    dlogprob = rng.normal(size=T).astype(np.float32)
    return Inputs(*map(jnp.asarray, (hidden, head, targets, dlogprob)))


class Candidate(NamedTuple):
    """One implementation, compiled."""

    call: Call  # loss and gradients, waited for
    temporaries: int  # bytes


def compile_candidate(f: Callable, inputs: Inputs, num_valid: int | None) -> Candidate:
    """Loss and both gradients, num_valid traced."""
    valid = None if num_valid is None else jnp.int32(num_valid)

    def loss(hidden, head, targets, dlogprob, valid):
        return (f(hidden, head, targets, valid) * dlogprob).sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*inputs, valid).compile()
    memory = compiled.memory_analysis()
    assert memory is not None

    def call():
        return jax.block_until_ready(compiled(*inputs, valid))

    return Candidate(call, memory.temp_size_in_bytes)


def check(candidates: dict[str, Candidate], num_valid: int | None) -> None:
    """Everybody's loss and gradients are those of `dpo_kernels.reference`."""

    def plain(hidden, head, targets, num_valid):
        out = reference.token_logprobs(hidden, head, targets, num_valid=num_valid)
        return out.logprob

    truth = compile_candidate(plain, make_inputs(), num_valid).call()
    for candidate in candidates.values():
        for x, y in zip(*map(jax.tree.leaves, (candidate.call(), truth)), strict=True):
            limit = TOLERANCE * float(jnp.abs(y).max())
            np.testing.assert_allclose(x, y, rtol=0, atol=limit)


PEAK_CHUNK = 992  # of the vocabulary; caches dislike a stride that is a power of 2
PEAK_FLOPS = 2 * T * D * (V // PEAK_CHUNK * PEAK_CHUNK)


def compile_peak(inputs: Inputs) -> Call:
    """Matrix products of the logits' shape alone: what this machine can reach."""

    @jax.jit
    def logits(hidden, head):
        def body(i, total):
            head_v = lax.dynamic_slice_in_dim(head, i * PEAK_CHUNK, PEAK_CHUNK)
            return total + jnp.einsum("TD,VD->TV", hidden, head_v)[0, 0]

        return lax.fori_loop(0, V // PEAK_CHUNK, body, 0.0)

    return lambda: jax.block_until_ready(logits(inputs.hidden, inputs.head))


def once(call: Call) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.fixture(scope="module")
def results():
    """The rows of this module; they are written at its end, if there are any."""
    found: list[rows.Row] = []
    yield found
    if found:
        rows.write("token_logprobs", found)


@pytest.mark.parametrize("num_valid", [None, T // 2], ids=["all rows", "half the rows"])
def test_forward_and_gradient(benchmark, num_valid, results):
    """Ours is no slower than the faster spelling of plain JAX."""
    inputs = make_inputs()
    candidates = {
        name: compile_candidate(f, inputs, num_valid)
        for name, f in IMPLEMENTATIONS.items()
    }
    check(candidates, num_valid)
    calls = {name: candidate.call for name, candidate in candidates.items()}
    calls[PEAK] = compile_peak(inputs)
    seconds: dict[str, list[float]] = {name: [] for name in calls}

    def timed(name: str) -> None:
        seconds[name].append(once(calls[name]))

    order = [PEAK, *PEERS]

    def others() -> None:
        # Ours does not always come after the same one.
        order.append(order.pop(0))
        for name in order:
            timed(name)

    benchmark.pedantic(timed, (OURS,), setup=others, rounds=ROUNDS, warmup_rounds=2)
    if benchmark.disabled:
        return
    seconds = {name: times[2:] for name, times in seconds.items()}
    for name in candidates:
        results.append(
            rows.row(
                "token_logprobs, forward and gradient",
                name,
                T=T,
                D=D,
                V=V,
                dtype="float32",
                seconds=min(seconds[name]),
                # Useful ones: nothing has to be computed for a row of padding.
                flops=(8 if name == OURS else 6) * (num_valid or T) * D * V,
                peak_tflops=PEAK_FLOPS / min(seconds[PEAK]) / 1e12,
                median_ms=round(1e3 * statistics.median(seconds[name]), 1),
                rounds=ROUNDS,
                num_valid=num_valid,
                temp_bytes=candidates[name].temporaries,
                load=os.getloadavg()[0],
            )
        )
    plain = min(min(seconds[name]) for name in PEERS)
    benchmark.extra_info["plain_ms"] = 1e3 * plain
    assert min(seconds[OURS]) <= plain
