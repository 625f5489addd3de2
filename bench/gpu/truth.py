"""Inputs and their gradients in float64, for every candidate in every framework.

Writes for each shape that has a truth: hidden, head, targets, dlogprob; logprob,
dhidden, dhead; for the main shape also ref_hidden, ref_head, loss, dpo_dhidden and
dpo_dhead. Gradients are rounded to float32, which is 1e-7 of them.
"""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bench.device import plan, programs
from bench.device.subject import Subject
from bench.gpu import shared
from bench.gpu.pool import PulsingCompiler
from bench.gpu.worker import Context
from dpo_kernels.verify.real import in_blocks

REFERENCE_SEED = 1  # of the DPO loss's other model


def logprobs64(hidden: Array, head: Array, targets: Array, _: Array) -> Array:
    """The op in float64, a block of rows at a time."""
    return in_blocks(hidden, head, targets, num_valid=None).logprob


def widened(x: programs.Inputs) -> programs.Inputs:
    """The same values in float64."""
    wide = (x.hidden.astype(jnp.float64), x.head.astype(jnp.float64))
    return x._replace(hidden=wide[0], head=wide[1])


def narrowed(tree: Any) -> Any:
    """As float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def write(context: Context, shape: plan.Shape, **arrays: Array) -> None:
    """To files."""
    for name, array in arrays.items():
        shared.save(context.work, shape, name, np.asarray(array))


def token_truth(x: programs.Inputs) -> Any:
    """Log-probabilities and gradients."""
    return narrowed(programs.gradient(logprobs64)(widened(x)))


def write_tokens(context: Context, shape: plan.Shape, truth: Future) -> None:
    """Inputs and truth of the per-token log-probabilities."""
    x = programs.make_inputs(shape)
    write(context, shape, hidden=x.hidden, head=x.head, targets=x.targets)
    write(context, shape, dlogprob=x.dlogprob)
    logprob, (dhidden, dhead) = truth.result()(x)
    write(context, shape, logprob=logprob, dhidden=dhidden, dhead=dhead)


def write_dpo(context: Context, shape: plan.Shape, truth: Future) -> None:
    """The reference, and the truth of the DPO loss."""
    x = programs.make_inputs(shape)
    reference = programs.make_inputs(shape, REFERENCE_SEED)
    write(context, shape, ref_hidden=reference.hidden, ref_head=reference.head)
    loss, (dhidden, dhead) = truth.result()(x, reference)
    write(context, shape, loss=loss, dpo_dhidden=dhidden, dpo_dhead=dhead)


def run(context: Context) -> None:
    """Write all files; no rows."""
    sizes, use = context.plan, PulsingCompiler(context.pulse)
    dpo = programs.dpo_gradient(logprobs64, sizes.sequences)

    def dpo_truth(*xs: programs.Inputs) -> Any:
        return narrowed(dpo(*map(widened, xs)))

    jobs: dict[str, tuple[Callable, plan.Shape, Future]] = {}
    for shape in sizes.with_truth:
        x = programs.abstract(shape)
        future = use.submit(token_truth, x, x64=True)
        jobs[f"truth {shape}"] = write_tokens, shape, future
        if shape == sizes.main:
            future = use.submit(dpo_truth, x, x, x64=True)
            jobs[f"truth of the DPO loss {shape}"] = write_dpo, shape, future
    for name in context.tasks(jobs):
        job, shape, future = jobs[name]
        T, D, V = shape
        subject = Subject(op=name, implementation="float64", T=T, D=D, V=V)
        if context.wanted(subject):
            context.trying(subject)
            job(context, shape, future)
