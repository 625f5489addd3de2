"""The op: log-probability of each target token, without the logits ever existing.

One `custom_vjp` for every backend. Letters: T tokens, D hidden, V vocabulary (this
device's slice of it, under `axis_name`); lower case is a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dpo_kernels.op.checks import check_arguments, check_vocab_parallel
from dpo_kernels.op.interface import TokenLogprobs
from dpo_kernels.op.loops import make_varying, varying_axes
from dpo_kernels.op.rule import (
    AxisName,
    axis_tuple,
    forward,
    make_static,
    unwrapped,
    vjp_backward,
    vjp_forward,
)
from dpo_kernels.op.tiling import problem_of


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
    static = make_static(
        problem_of(hidden, head, num_valid, workspace_bytes),
        softcap=softcap,
        scale=scale,
        axis_name=axis_name,
        stats=stats,
        implementation=implementation,
    )
    if axis_name is not None:
        check_vocab_parallel(head, targets, axis_name)
    # Inputs get the same varying axes before the vjp. So where one is replicated over
    # the data axis, JAX sums its gradient over it, and the vjp need not.
    vocab_axes = frozenset(axis_tuple(axis_name))
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(static, hidden, head, bias, targets, num_valid):
    return forward(static, 0, hidden, head, bias, targets, num_valid).results


def _forward(static, *primals):
    values, wanted = unwrapped(*primals)
    return vjp_forward(static, wanted, values)


_token_logprobs.defvjp(_forward, vjp_backward, symbolic_zeros=True)
