"""Argument checks of the public ops: what was given, the rule, the way out."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dpo_kernels.op.interface import STATS
from dpo_kernels.op.loops import varying_axes

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def check_arguments(hidden, head, targets, num_valid, bias, softcap, stats) -> None:
    """Refuse shapes, dtypes and options that `token_logprobs` cannot mean.

    Raises:
        ValueError: naming the argument, its value and the rule.
    """
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"hidden {hidden.shape} and head {head.shape} must be [T, D] and [V, D] "
            "with the same D; reshape a batch to rows, transpose a [D, V] head"
        )
    if str(hidden.dtype) not in _DTYPES or hidden.dtype != head.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and head is {head.dtype}; both must be the "
            f"same, one of {', '.join(_DTYPES)}: cast one of them"
        )
    if targets.shape != hidden.shape[:1] or not jnp.issubdtype(
        targets.dtype, jnp.integer
    ):
        raise ValueError(
            f"targets is {targets.dtype}{list(targets.shape)}; it must be an integer "
            f"vector of length T={hidden.shape[0]}"
        )
    if bias is not None and (
        bias.shape != head.shape[:1] or not jnp.issubdtype(bias.dtype, jnp.floating)
    ):
        raise ValueError(
            f"bias is {bias.dtype}{list(bias.shape)}; it must be a floating-point "
            f"vector of length V={head.shape[0]}"
        )
    if num_valid is not None and (
        jnp.ndim(num_valid) != 0
        or not jnp.issubdtype(jnp.result_type(num_valid), jnp.integer)
    ):
        raise ValueError(
            f"{num_valid=} must be an integer scalar, or None for all rows"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{softcap=} must be above 0; give None for no soft-cap")
    unknown = [name for name in stats if name not in STATS]
    if unknown or len(set(stats)) != len(stats):
        raise ValueError(f"{stats=} must be distinct names out of {', '.join(STATS)}")


def check_vocab_parallel(
    head: Array, targets: Array, axis_name: str | tuple[str, ...]
) -> None:
    """Refuse inputs whose types say that they are split over the wrong axes.

    Raises:
        ValueError: `targets` differ along the axis, or `head` does not. Not seen under
            `shard_map(..., check_vma=False)`, where types say nothing.
    """
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    if not varying_axes(lax.axis_index(axis_name)):
        return
    if names & varying_axes(targets):
        raise ValueError(
            f"targets varies over {axis_name=}; every device of it must score the same "
            "rows: gather them with lax.all_gather(..., to='invarying'), and hidden too"
        )
    if not names <= varying_axes(head):
        raise ValueError(
            f"head does not vary over all of {axis_name=}; each device must hold its "
            "own slice of the vocabulary: give it in_specs=PartitionSpec(axis_name)"
        )
