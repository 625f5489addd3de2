"""Attention, a file an implementation, and which of them a run has."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from dpo_kernels.op.devices import of_jax
from engine.errors import InputError
from engine.models.architecture import DecoderConfig
from engine.models.attention import cudnn, tiles
from engine.models.attention.unshared import Unshared
from engine.parallel.batch import Arrangement, KeySpans
from engine.parallel.sharding import SEQUENCE

# The fastest that can be had comes last.
_WORDS = {
    "tiles": "tiles: plain JAX, a tile of queries and keys at a time",
    "cudnn": "cudnn: NVIDIA's library, as JAX calls it",
    "splash": "splash: the kernels for TPUs that come with JAX",
    "tokamax": "tokamax: its kernels for NVIDIA's Hopper and Blackwell GPUs",
}
_IN_16_BITS = ("bfloat16", "float16")
_FASTEST = {"tpu": "splash", "gpu": "tokamax"}  # of those that a platform can have
IMPLEMENTATIONS = tuple(_WORDS)

__all__ = [
    "IMPLEMENTATIONS",
    "Case",
    "attend",
    "choose",
    "describe",
    "laid_out",
    "unsupported",
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the choice of an implementation depends on."""

    platform: str  # of the devices: cpu, gpu (NVIDIA's), rocm or tpu
    arrangement: Arrangement
    dtype: str = "bfloat16"  # of queries, keys and values
    sequence: int = 1  # devices that the tokens of a row are spread over
    capability: tuple[int, int] | None = None  # of an NVIDIA GPU, to compute
    head_dim: int = 128
    capped: bool = False  # whether scores are

    @classmethod
    def of(
        cls, mesh: Mesh, arrangement: Arrangement, dtype: Any, model: DecoderConfig
    ) -> "Case":
        """That of a model's rows on a mesh, computed in `dtype`."""
        device = of_jax(mesh.devices.flat[0])
        return cls(
            platform=device.platform,
            arrangement=arrangement,
            dtype=jnp.dtype(dtype).name,
            sequence=mesh.shape[SEQUENCE],
            capability=device.capability,
            head_dim=model.head_dim,
            capped=model.attn_softcap is not None,
        )


def unsupported(name: str, case: Case) -> str | None:
    """Why an implementation cannot be had, or None."""
    if name == "tiles":
        return None
    kind, platform = ("TPUs", "tpu") if name == "splash" else ("NVIDIA GPUs", "gpu")
    if case.platform != platform:
        return f"it is for {kind}, and the devices are of platform {case.platform}"
    if name == "cudnn":
        return _fault_of_cudnn(case)
    if case.sequence > 1 and case.arrangement.share_prompt:
        return "rows with shared beginnings are not spread over devices for it"
    if name == "splash":
        return None
    if case.capability is None or case.capability[0] not in (9, 10):
        return (
            "its kernels are for compute capability 9 and 10 (Hopper, Blackwell), and "
            f"the devices' is {_found(case)}"
        )
    if case.dtype not in _IN_16_BITS:
        return f"its kernels compute in 16 bits (model.dtype={case.dtype})"
    return _fault_of_tokamax()


def _fault_of_cudnn(case: Case) -> str | None:
    """Why it cannot be had on a GPU; None where it can."""
    capability = case.capability or (0, 0)
    most = 256 if capability >= (9, 0) else 128
    if case.arrangement.with_spans:
        return "a row has one sequence for it (packing, share_prompt)"
    if case.sequence > 1:
        return f"its queries are whole rows (sharding.sequence={case.sequence})"
    if capability < (8, 0):
        return f"it needs compute capability 8.0, and the devices' is {_found(case)}"
    if case.dtype not in _IN_16_BITS:
        return f"it computes in 16 bits (model.dtype={case.dtype})"
    if case.capped:
        return "it caps no scores, as the model's attention does"
    if case.head_dim > most or case.head_dim % 8:
        return (
            f"heads are multiples of 8 up to {most} for it on these devices, and the "
            f"model's are {case.head_dim}"
        )
    return cudnn.fault()


def _found(case: Case) -> str:
    """The devices' compute capability."""
    return ".".join(map(str, case.capability or ())) or "not known"


@cache
def _fault_of_tokamax() -> str | None:
    """Why its kernels cannot be imported; None where they can."""
    if find_spec("tokamax") is None:
        return "the tokamax package is not installed (pip install tokamax)"
    try:
        importlib.import_module("engine.models.attention.hopper")
    except (ImportError, AttributeError) as error:
        return f"the tokamax package that is installed has another form: {error}"
    return None


def choose(asked: str, case: Case) -> str:
    """The implementation that a run has: the asked one, or with auto the fastest.

    Raises:
        InputError: the asked one cannot be had.
    """
    if asked == "auto":
        return next(x for x in reversed(IMPLEMENTATIONS) if not unsupported(x, case))
    if why := unsupported(asked, case):
        raise InputError(f"attention={asked!r} cannot be: {why}; use auto or tiles")
    return asked


def describe(asked: str, case: Case) -> str:
    """Which one a run has, and with auto why not the platform's fastest.

    Raises:
        InputError: as `choose`.
    """
    words = _WORDS[choose(asked, case)]
    fastest = _FASTEST.get(case.platform, "tiles")
    if asked == "auto" and (why := unsupported(fastest, case)):
        words += f"; not {fastest}, as {why}"
    return words


def laid_out(
    name: str, spans: KeySpans | None, arrangement: Arrangement
) -> KeySpans | Unshared | None:
    """What `attend` is to be given of rows: once a step, not once a layer.

    All but the plain tiles have a single run of keys for a query.
    """
    if spans is None or name == "tiles" or not arrangement.share_prompt:
        return spans
    length = spans.begin.shape[1]
    longer = 2 * length
    if arrangement.longest is not None and not arrangement.packing:
        longer = min(longer, length + arrangement.longest)  # a row has one pair
    return Unshared.of(spans, longer)


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
    spans: KeySpans | Unshared | None,
    longest: int | None,
    starts: Sequence[int | Int[Array, ""]] = (0,),
    key_begin: Int[Array, "R S"] | None = None,
    device: Any = None,
) -> Float[Array, "R Q N H"]:
    """softmax(cap(scale * q . k)) v over the keys that each query sees.

    Args:
        name: one of `IMPLEMENTATIONS`.
        windows: what layers have: how many tokens of its sequence a query sees, itself
            included; None: all up to it.
        which: the number of this layer's window.
        spans: the keys of each query's sequence, as `laid_out` gives them; None: all of
            its row up to it.
        longest: tokens that no sequence has more of.
        starts: the queries are so many runs of a row of keys, of equal lengths, and
            begin there in it.
        key_begin: where the sequences of keys begin; None: as those of the queries.
        device: one of those that this is for.
    """
    if isinstance(spans, Unshared):
        same = partial(attend, name, scale=scale, softcap=softcap, windows=windows)
        of_longer = partial(same, which=which, longest=longest, device=device)
        return spans.attend(partial(of_longer, spans=spans.spans), query, key, value)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "spans": spans}
    options |= {"starts": starts}
    if name in ("cudnn", "splash"):
        if name == "cudnn":
            one = partial(cudnn.attend, scale=scale, device=device)
        else:
            # Here, since it takes Pallas's time to be imported.
            from engine.models.attention import splash

            one = partial(
                splash.attend, longest=longest, key_begin=key_begin, **options
            )
        kernels = [partial(one, window=x) for x in windows]
        if len(kernels) == 1:
            return kernels[0](query, key, value)
        return lax.switch(which, kernels, query, key, value)
    window, length = None, key.shape[1]
    widths = [length if x is None else min(x, length) for x in windows]
    if min(widths) < length:  # else nothing is hidden
        window = jnp.asarray(widths, jnp.int32)[which]
    options |= {"window": window}
    if name == "tiles":
        return tiles.attend(query, key, value, **options)
    assert name == "tokamax"
    # Here, since other runs need not have the package.
    from engine.models.attention import hopper

    return hopper.attend(query, key, value, device=device, **options)
