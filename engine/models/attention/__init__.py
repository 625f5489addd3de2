"""Attention, a file an implementation, and which of them a run has."""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from engine.errors import InputError
from engine.models.attention import tiles
from engine.parallel.batch import Arrangement, KeySpans

IMPLEMENTATIONS = ("tiles", "splash")

__all__ = ["IMPLEMENTATIONS", "attend", "choose", "unsupported"]


def unsupported(
    name: str, platform: str, arrangement: Arrangement, sequence: int = 1
) -> str | None:
    """Why an implementation cannot be had, or None.

    Args:
        platform: of the devices: cpu, gpu or tpu.
        sequence: devices that the tokens of a row are spread over.
    """
    if name == "tiles":
        return None
    if platform != "tpu":
        return f"it is for TPUs, and the devices are of platform {platform}"
    if sequence > 1:
        return f"its queries are whole rows (sharding.sequence={sequence})"
    if arrangement.share_prompt:
        return "its rows have no place for what two sequences share (share_prompt)"
    return None


def choose(
    asked: str, platform: str, arrangement: Arrangement, sequence: int = 1
) -> str:
    """The implementation that a run has: the asked one, or with auto the fastest.

    Raises:
        InputError: the asked one cannot be had.
    """
    facts = platform, arrangement, sequence
    if asked == "auto":
        usable = (x for x in reversed(IMPLEMENTATIONS))
        return next(x for x in usable if not unsupported(x, *facts))
    if why := unsupported(asked, *facts):
        raise InputError(f"attention={asked!r} cannot be: {why}; use auto or tiles")
    return asked


def attend(
    name: str,
    query: Float[Array, "R Q N H"],
    key: Float[Array, "R S K H"],
    value: Float[Array, "R S K H"],
    *,
    scale: float,
    softcap: float | None,
    windows: Sequence[int | None],
    which: Int[Array, ""],
    spans: KeySpans | None,
    longest: int | None,
    starts: Sequence[int | Int[Array, ""]] = (0,),
) -> Float[Array, "R Q N H"]:
    """softmax(cap(scale * q . k)) v over the keys that each query sees.

    Args:
        name: one of `IMPLEMENTATIONS`.
        windows: what layers have: how many tokens of its sequence a query sees, itself
            included; None: all up to it.
        which: the number of this layer's window.
        spans: the keys of each query's sequence; None: all of its row up to it.
        longest: tokens that no sequence has more of.
        starts: the queries are so many runs of a row of keys, of equal lengths, and
            begin there in it.
    """
    options = {"scale": scale, "softcap": softcap, "spans": spans}
    if name == "tiles":
        window, length = None, key.shape[1]
        widths = [length if x is None else min(x, length) for x in windows]
        if min(widths) < length:  # else nothing is hidden
            window = jnp.asarray(widths, jnp.int32)[which]
        return tiles.attend(query, key, value, window=window, starts=starts, **options)
    assert name == "splash" and len(starts) == 1
    # Here, since it takes Pallas's time to be imported.
    from engine.models.attention import splash

    kernels = [
        partial(splash.attend, window=x, longest=longest, **options) for x in windows
    ]
    if len(kernels) == 1:
        return kernels[0](query, key, value)
    return lax.switch(which, kernels, query, key, value)
