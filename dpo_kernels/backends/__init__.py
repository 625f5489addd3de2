"""Backends by name, and the choice among them."""

import functools
import importlib
import logging
from typing import cast

import jax

from dpo_kernels.interface import Backend

BACKENDS = {"xla": "dpo_kernels.backends.xla"}

_log = logging.getLogger(__name__)


def traced_platform() -> str:
    """`cpu`, `gpu` or `tpu`: the platform of the mesh being traced, else the default.

    The mesh comes first, so that compiling ahead of time for an absent device picks
    what that device will run.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else str(device.platform)
    return "gpu" if platform in ("cuda", "rocm") else platform


def load_backend(implementation: str) -> Backend:
    """The backend of that name; `auto` is resolved for the platform being traced.

    Raises:
        ValueError: a name that is not in `BACKENDS`.
    """
    if implementation == "auto":
        implementation = _resolve_auto(traced_platform())
    if implementation not in BACKENDS:
        raise ValueError(
            f"{implementation=} is unknown; use one of: auto, {', '.join(BACKENDS)}"
        )
    return cast(Backend, importlib.import_module(BACKENDS[implementation]))


@functools.cache
def _resolve_auto(platform: str) -> str:
    _log.info("token_logprobs: implementation='auto' is 'xla' on %s", platform)
    return "xla"
