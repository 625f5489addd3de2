"""What the backward pass keeps of a layer, and what it computes again."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax

from engine.parallel.host_memory import HOST

Remat = Literal["none", "dots", "full", "offload"]
# From what keeps most to what keeps least; auto is for who compiles steps to replace.
REMAT: tuple[Remat, ...] = get_args(Remat)
AUTO = "auto"
# What a layer gives names to.
BLOCK_OUT = "block_out"
LAYER_IN = "layer_in"


def _save_activations(prim: Any, *avals: Any, **params: Any) -> bool:
    """Keeps what has more than two dims: inside a layer all else is made of weights."""
    del prim, params
    return any(aval.ndim > 2 for aval in avals)


def policy(remat: str) -> Callable[..., bool]:
    """What the backward pass keeps of a layer; never its gathered weights.

    With auto nothing: where no step chooses, there is no backward pass.
    """
    keep = jax.checkpoint_policies
    if remat == "none":
        return _save_activations
    if remat == "dots":
        # A block's output as well: recomputing it would repeat the sum over `tensor`.
        return keep.save_from_both_policies(
            keep.dots_with_no_batch_dims_saveable,
            keep.save_only_these_names(BLOCK_OUT),
        )
    if remat == "offload":
        # As with full, a layer's input is all that stays: in the host's memory.
        return keep.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_IN],
            offload_src="device",
            offload_dst=HOST,
        )
    return keep.nothing_saveable


def recomputes(remat: str) -> bool:
    """Whether all of a layer is computed again for its gradient."""
    return remat not in ("none", "dots")


def remats_of_auto(memory_is_known: bool) -> tuple[Remat, ...]:
    """What `auto` tries, from what keeps most on.

    Where devices do not say what they have, as CPUs, it recomputes all: there, what is
    kept costs as much time to move as it saves.
    """
    return REMAT if memory_is_known else ("full",)
