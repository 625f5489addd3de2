"""The op: log-probability of each target token, without the logits ever existing.

One `custom_vjp` for every backend. Letters: T tokens, D hidden, V vocabulary (this
device's slice of it, under `axis_name`); lower case is a tile.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from dpo_kernels.op.backends import load_backend
from dpo_kernels.op.backward import backward, row_coefficients
from dpo_kernels.op.checks import check_arguments, check_vocab_parallel
from dpo_kernels.op.interface import (
    Kept,
    LogitOptions,
    Partials,
    TokenLogprobs,
    accumulator,
)
from dpo_kernels.op.job import Backend, Inputs, Job, Wanted
from dpo_kernels.op.kept import kept_rows
from dpo_kernels.op.loops import make_varying, varying_axes
from dpo_kernels.op.partials import finish, merge, no_vocabulary
from dpo_kernels.op.scale import GradientScale
from dpo_kernels.op.tiling import BackwardTile, backward_tile, problem_of

AxisName = str | tuple[str, ...]


def token_logprobs(
    hidden: Float[Array, "T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, " T"],
    *,
    num_valid: Int[Array, ""] | int | None = None,
    bias: Float[Array, " V"] | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    axis_name: AxisName | None = None,
    stats: tuple[str, ...] = (),
    workspace_bytes: int = 256 * 2**20,
    implementation: str = "auto",
) -> TokenLogprobs:
    """Log-probability in nats of each target; the [T, V] logits are never stored.

        z = cap(scale * hidden @ head.T + bias),  cap(z) = softcap * tanh(z / softcap)
        logprob[t] = z[t, targets[t]] - lse[t],   lse[t] = logsumexp(z[t])

    `logprob`, the entropy and the gradients are made of differences from the row's
    largest logit, as in `jax.nn.log_softmax`. An offset that a row's logits share costs
    them what it costs the logits, each of which is rounded at its own size: in float32
    to 6e-5 near 1000. The products, `scale`, `bias` and `softcap` are, so that logits
    they leave exact lose nothing. `lse` is rounded once more, at its own size.

    `logprob` and `lse` may be differentiated with respect to `hidden`, `head` and
    `bias`, with any cotangents; the stats carry no gradient. An argument that is not
    differentiated costs no work in the backward.

    Args:
        hidden: bfloat16, float16, float32, or (under x64) float64. Where `xla` runs,
            float32 is multiplied at `jax.default_matmul_precision`.
        head: the dtype of `hidden`. Its gradient is summed in float32.
        targets: ids in [0, V); one outside gives a logprob of -inf.
        num_valid: rows at and after it are padding: they may hold anything, give 0 and
            get gradient 0, and whole blocks of them are skipped. May be traced.
        bias: added before the soft-cap. An entry of -inf takes its vocabulary entry
            away, whatever the soft-cap. Its gradient is summed in float32 from what
            the gradient of `head` is made of, the logits' gradients in the dtype of
            `hidden`: it is off by at most eps of that dtype times the sum of their
            absolute values, also where the bias is float32. (`pallas_tpu` sums before
            it rounds.)
        axis_name: inside `shard_map`: `head` and `bias` are this device's slice of the
            vocabulary in axis order, `targets` ids in the whole of it. `hidden` must be
            the same on the whole axis; so are all results and, summed over it, the
            gradient of `hidden`. Where `hidden` is typed as varying over the axis, as
            `lax.all_gather` leaves it, each device gets its own share of the gradient,
            which autodiff then reduce-scatters. Under `check_vma=False`, take gradients
            inside the `shard_map`.
        stats: any of `entropy`, `collision`, `mean_logit`, `top1`.
        workspace_bytes: upper bound on temporaries beyond the float32 gradient of
            `hidden` and a few numbers per token. More is faster: where gradients are
            asked for, what is left holds exponentials from the forward until the
            backward, which then recomputes the others only (6TDV FLOPs in all, not 8).
            Everything is kept from about T * V elements on.
        implementation: `auto`, or a backend's name.
    Returns:
        Nats in float32 (float64 for float64 inputs), 0 in padding rows.
    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown option or name.
    Source: Wijmans et al. 2024, arXiv:2411.09009 (the idea; the code is ours).
    """
    stats = tuple(stats)
    check_arguments(hidden, head, targets, num_valid, bias, softcap, stats)
    num_valid = None if num_valid is None else jnp.asarray(num_valid, jnp.int32)
    problem = problem_of(hidden, head, num_valid, workspace_bytes)
    static = _Static(
        options=LogitOptions(
            softcap=None if softcap is None else float(softcap),
            scale=float(scale),
            stats=stats,
        ),
        axis_name=axis_name,
        workspace_bytes=workspace_bytes,
        backend=load_backend(implementation, problem),
    )
    if axis_name is not None:
        check_vocab_parallel(head, targets, axis_name)
    # Inputs get the same varying axes before the vjp. So where one is replicated over
    # the data axis, JAX sums its gradient over it, and the vjp need not.
    vocab_axes = frozenset(_axis_tuple(axis_name))
    axes = varying_axes(hidden, head, targets, bias, num_valid)
    hidden = make_varying(hidden, axes - vocab_axes)
    head = make_varying(head, axes)
    bias = None if bias is None else make_varying(bias, axes)
    results: tuple[Array, ...] = _token_logprobs(
        static, hidden, head, bias, targets, num_valid
    )
    logprob, lse, *stat_values = results
    named = dict(zip(stats, map(lax.stop_gradient, stat_values), strict=True))
    return TokenLogprobs(logprob=logprob, lse=lse, **named)


@dataclass(frozen=True, kw_only=True)
class _Static:
    options: LogitOptions
    axis_name: AxisName | None
    workspace_bytes: int
    backend: Backend


def _axis_tuple(axis_name: AxisName | None) -> tuple[str, ...]:
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def _local_targets(targets: Array, V: int, axis_name: AxisName | None) -> Array:
    targets = targets.astype(jnp.int32)
    if axis_name is None:
        return targets
    return targets - lax.axis_index(axis_name) * V


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(static, hidden, head, bias, targets, num_valid):
    return _forward(static, 0, hidden, head, bias, targets, num_valid).results


class _Forward(NamedTuple):
    results: tuple[Array, ...]  # logprob, lse, stats
    merged: Partials  # of the whole vocabulary; zeros in padding rows
    kept: Kept | None


def _forward(
    static: _Static, keep_v: int, hidden, head, bias, targets, num_valid
) -> _Forward:
    """Keeps exponentials of the first `keep_v` vocabulary entries."""
    acc = accumulator(hidden.dtype)
    T, stats = hidden.shape[0], static.options.stats
    kept: Kept | None = None
    if T == 0:
        partials = no_vocabulary(T, acc, stats)
        return _Forward(finish(partials, stats), partials, None)
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
    return _Forward(results, partials, kept)


def _vjp_forward(static: _Static, hidden, head, bias, targets, num_valid):
    values = jax.tree.map(
        lambda x: x.value,
        (hidden, head, bias, targets, num_valid),
        is_leaf=lambda x: hasattr(x, "perturbed"),
    )
    # Whether an input is differentiated is static: it travels as tree structure.
    wanted = Wanted(*(_flag(x) for x in (hidden, head, bias)))
    hidden, head, _, _, num_valid = values
    tile = _shared_tile(static, hidden, head, num_valid)
    keep_v = 0 if tile is None or wanted == (None, None, None) else tile.keep_v
    results, merged, kept = _forward(static, keep_v, *values)
    # Not lse, which has lost the digits that the maximum takes: see `finish`.
    rows = (results[0], merged.max, merged.sum_exp, merged.target_logit)
    return results, (values, rows, kept, wanted)


def _flag(primal) -> tuple[()] | None:
    return () if primal is not None and primal.perturbed else None


def _is_empty(hidden, head) -> bool:
    return hidden.shape[0] == 0 or head.shape[0] == 0


def _shared_tile(static: _Static, hidden, head, num_valid) -> BackwardTile | None:
    """None where the backend has a backward of its own, or there is nothing to do."""
    if static.backend.backward is not None or _is_empty(hidden, head):
        return None
    problem = problem_of(hidden, head, num_valid, static.workspace_bytes)
    return backward_tile(problem, fused=static.backend.fused_dlogits)


def _vjp_backward(static: _Static, saved, cotangents):
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
        axes = tuple(a for a in _axis_tuple(static.axis_name) if a not in own)
        dhidden = lax.psum(dhidden, axes) if axes else dhidden
        dhidden = dhidden.astype(hidden.dtype)
    return dhidden, grads.head, grads.bias, None, None


_token_logprobs.defvjp(_vjp_forward, _vjp_backward, symbolic_zeros=True)
