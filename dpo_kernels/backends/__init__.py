"""Backends by name, and the choice among them."""

import functools
import importlib
import logging
from typing import cast

from dpo_kernels.devices import Device
from dpo_kernels.interface import Backend
from dpo_kernels.tiling import Problem

# From the fastest to the one that runs anywhere: the order in which `auto` tries them.
BACKENDS = {
    "mosaic_gpu": "dpo_kernels.backends.mosaic_gpu",
    "pallas_tpu": "dpo_kernels.backends.pallas_tpu",
    "triton": "dpo_kernels.backends.triton",
    "xla": "dpo_kernels.backends.xla",
}

_log = logging.getLogger(__name__)


def load_backend(implementation: str, problem: Problem) -> Backend:
    """The backend of that name, if it can do this; `auto` takes the first that can.

    Raises:
        ValueError: a name that is not in `BACKENDS`.
        NotImplementedError: a backend that does not cover the device, dtype or shape.
    """
    if implementation == "auto":
        return _resolve_auto(problem)
    if implementation not in BACKENDS:
        raise ValueError(
            f"{implementation=} is unknown; use one of: auto, {', '.join(BACKENDS)}"
        )
    backend = _module(implementation)
    reason = backend.unsupported(problem)
    if reason is not None:
        others = " or ".join((*supported_backends(problem), "auto"))
        raise NotImplementedError(f"{implementation=} {reason}; use {others}")
    return backend


def supported_backends(problem: Problem) -> tuple[str, ...]:
    """The names of those that can do this, the fastest first."""
    return tuple(n for n in BACKENDS if _module(n).unsupported(problem) is None)


def _resolve_auto(problem: Problem) -> Backend:
    passed_over = []
    for name in BACKENDS:
        reason = _module(name).unsupported(problem)
        if reason is None:
            _log_choice(name, problem.device, tuple(passed_over))
            return _module(name)
        passed_over.append(f"{name} {reason}")
    raise AssertionError("xla runs anywhere")


@functools.cache
def _log_choice(name: str, device: Device, passed_over: tuple[str, ...]) -> None:
    because = f" ({'; '.join(passed_over)})" if passed_over else ""
    _log.info(
        "token_logprobs: implementation='auto' is %r on %s%s", name, device, because
    )


def _module(name: str) -> Backend:
    return cast(Backend, importlib.import_module(BACKENDS[name]))
