"""What is computed forwards and backwards, of rows that are here.

Letters: T tokens, D hidden, V vocabulary (this device's slice of it, under
`axis_name`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from dpo_kernels.op.backends import load_backend
from dpo_kernels.op.backward import backward, row_coefficients
from dpo_kernels.op.interface import Kept, LogitOptions, Partials, accumulator
from dpo_kernels.op.job import Backend, Inputs, Job, Wanted
from dpo_kernels.op.kept import kept_rows
from dpo_kernels.op.loops import varying_axes
from dpo_kernels.op.partials import finish, merge, no_vocabulary
from dpo_kernels.op.scale import GradientScale
from dpo_kernels.op.tiling import BackwardTile, Problem, backward_tile, problem_of

AxisName = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Static:
    """What is not traced."""

    options: LogitOptions
    axis_name: AxisName | None
    workspace_bytes: int
    backend: Backend


def make_static(
    problem: Problem,
    *,
    softcap: float | None,
    scale: float,
    axis_name: AxisName | None,
    stats: tuple[str, ...],
    implementation: str,
) -> Static:
    """For rows and a head of these shapes.

    Raises:
        ValueError: an implementation that cannot do it, or that there is not.
    """
    return Static(
        options=LogitOptions(
            softcap=None if softcap is None else float(softcap),
            scale=float(scale),
            stats=stats,
        ),
        axis_name=axis_name,
        workspace_bytes=problem.workspace_bytes,
        backend=load_backend(implementation, problem),
    )


def axis_tuple(axis_name: AxisName | None) -> tuple[str, ...]:
    """The axes, where there may be none or one that is no tuple."""
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def _local_targets(targets: Array, V: int, axis_name: AxisName | None) -> Array:
    targets = targets.astype(jnp.int32)
    if axis_name is None:
        return targets
    return targets - lax.axis_index(axis_name) * V


class Forward(NamedTuple):
    """What is computed forwards."""

    results: tuple[Array, ...]  # logprob, lse, stats
    merged: Partials  # of the whole vocabulary; zeros in padding rows
    kept: Kept | None


def forward(
    static: Static, keep_v: int, hidden, head, bias, targets, num_valid
) -> Forward:
    """Keeps exponentials of the first `keep_v` vocabulary entries."""
    acc = accumulator(hidden.dtype)
    T, stats = hidden.shape[0], static.options.stats
    kept: Kept | None = None
    if T == 0:
        partials = no_vocabulary(T, acc, stats)
        return Forward(finish(partials, stats), partials, None)
    if head.shape[0] == 0:
        partials = no_vocabulary(T, acc, stats)
    else:
        partials, kept = static.backend.forward_partials(
            hidden,
            head,
            _local_targets(targets, head.shape[0], static.axis_name),
            bias,
            num_valid,
            options=static.options,
            workspace_bytes=static.workspace_bytes,
            keep_v=keep_v,
        )
        partials = merge(
            partials,
            lambda x: x.max(axis=0, keepdims=True),
            lambda x: x.sum(axis=0, keepdims=True),
        )
        partials = jax.tree.map(lambda x: x[0], partials)
    if static.axis_name is not None:
        partials = merge(
            partials,
            lambda x: lax.pmax(x, static.axis_name),
            lambda x: lax.psum(x, static.axis_name),
        )
    results = finish(partials, stats)
    if num_valid is not None:
        valid_T = jnp.arange(T, dtype=jnp.int32) < num_valid
        results, partials = jax.tree.map(
            lambda x: jnp.where(valid_T, x, jnp.zeros_like(x)), (results, partials)
        )
    return Forward(results, partials, kept)


def unwrapped(hidden, head, bias, *others) -> tuple[Any, Wanted]:
    """Values of primals with `symbolic_zeros`, and which are differentiated.

    That is static: it travels as tree structure.
    """
    primals = hidden, head, bias, *others
    values = jax.tree.map(
        lambda x: x.value, primals, is_leaf=lambda x: hasattr(x, "perturbed")
    )
    return values, Wanted(*(_flag(x) for x in (hidden, head, bias)))


def vjp_forward(static: Static, wanted: Wanted, values, *, keep: bool = True):
    """The results, and what `vjp_backward` needs.

    values: hidden, head, bias, targets and num_valid.
    keep: exponentials too, as far as the workspace goes.
    """
    hidden, head, _, _, num_valid = values
    tile = _shared_tile(static, hidden, head, num_valid)
    keep = keep and tile is not None and wanted != (None, None, None)
    keep_v = tile.keep_v if keep and tile is not None else 0
    results, merged, kept = forward(static, keep_v, *values)
    # Not lse, which has lost the digits that the maximum takes: see `finish`.
    rows = (results[0], merged.max, merged.sum_exp, merged.target_logit)
    return results, (values, rows, kept, wanted)


def _flag(primal) -> tuple[()] | None:
    return () if primal is not None and primal.perturbed else None


def _is_empty(hidden, head) -> bool:
    return hidden.shape[0] == 0 or head.shape[0] == 0


def _shared_tile(static: Static, hidden, head, num_valid) -> BackwardTile | None:
    """None where the backend has a backward of its own, or there is nothing to do."""
    if static.backend.backward is not None or _is_empty(hidden, head):
        return None
    problem = problem_of(hidden, head, num_valid, static.workspace_bytes)
    return backward_tile(problem, fused=static.backend.fused_dlogits)


def vjp_backward(static: Static, saved, cotangents):
    """The gradients of hidden, head and bias, and none of the others."""
    (hidden, head, bias, targets, num_valid), saved_rows, kept, wanted = saved
    logprob, top, sum_exp, target_logit = saved_rows
    if _is_empty(hidden, head):
        dbias = None if bias is None else jnp.zeros_like(bias)
        return jnp.zeros_like(hidden), jnp.zeros_like(head), dbias, None, None
    dlogprob, dlse = (
        jnp.zeros_like(logprob) if isinstance(ct, SymbolicZero) else ct
        for ct in cotangents[:2]
    )
    options = static.options
    scale = GradientScale.of(hidden.dtype, options.scale, dlogprob, dlse)
    rows = row_coefficients(logprob, top, sum_exp, dlogprob, dlse, scale.dlogits_scale)
    targets = _local_targets(targets, head.shape[0], static.axis_name)
    grads = backward(
        Job(
            backend=static.backend,
            options=options,
            inputs=Inputs(
                hidden=hidden,
                head=head,
                bias=bias,
                targets=targets,
                num_valid=num_valid,
            ),
            rows=rows,
            scale=scale,
            kept=kept and kept_rows(kept, target_logit, *rows, options),
            wanted=wanted,
            shared_tile=_shared_tile(static, hidden, head, num_valid),
            workspace_bytes=static.workspace_bytes,
        )
    )
    dhidden = grads.hidden
    if dhidden is not None:
        # A device that has a copy of its own gets the gradient of that copy: whoever
        # made the copies sums them, an all_gather by a reduce-scatter.
        own = varying_axes(hidden)
        axes = tuple(a for a in axis_tuple(static.axis_name) if a not in own)
        dhidden = lax.psum(dhidden, axes) if axes else dhidden
        dhidden = dhidden.astype(hidden.dtype)
    return dhidden, grads.head, grads.bias, None, None
