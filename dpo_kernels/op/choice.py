"""The choice among an op's backends: one by name, or the first that can do it."""

import functools
import importlib
import logging
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from dpo_kernels.op.devices import Device

_log = logging.getLogger(__name__)


@runtime_checkable
class Problem(Protocol):
    """What is asked; what an op's own says besides is its backends' concern."""

    @property
    def device(self) -> Device:
        """The one that is traced for."""
        ...


class Choice[Backend]:
    """The backends of one op, from the fastest to the one that runs anywhere.

    A backend is a module, imported when it is first looked at, with
    `unsupported(problem)`: why it cannot do that, as `needs ...; this is ...`, or None.
    """

    def __init__(self, op: str, modules: Mapping[str, str]):
        """`modules` in the order in which `auto` tries them, by the backends' names."""
        self.op = op
        self.modules = modules

    def load(self, implementation: str, problem: Problem) -> Backend:
        """The backend of that name; `auto` takes the first that can do this.

        Raises:
            ValueError: a name that there is no backend of.
            NotImplementedError: a backend that cannot do this.
        """
        if implementation == "auto":
            return self._resolve_auto(problem)
        self.check_name(implementation)
        backend = self.module(implementation)
        reason = backend.unsupported(problem)
        if reason is not None:
            others = " or ".join((*self.supported(problem), "auto"))
            raise NotImplementedError(f"{implementation=} {reason}; use {others}")
        return backend

    def check_name(self, implementation: str) -> None:
        """Refuse a name that is neither `auto` nor a backend's."""
        if implementation not in ("auto", *self.modules):
            names = ", ".join(self.modules)
            raise ValueError(f"{implementation=} is unknown; use one of: auto, {names}")

    def supported(self, problem: Problem) -> tuple[str, ...]:
        """The names of those that can do this, the fastest first."""
        found = (n for n in self.modules if self.module(n).unsupported(problem) is None)
        return tuple(found)

    def module(self, name: str) -> Any:
        """The backend of that name, whether or not it can do anything here."""
        return importlib.import_module(self.modules[name])

    def _resolve_auto(self, problem: Problem) -> Backend:
        passed_over = []
        for name in self.modules:
            backend = self.module(name)
            reason = backend.unsupported(problem)
            if reason is None:
                log_choice(self.op, name, problem.device, tuple(passed_over))
                return backend
            passed_over.append(f"{name} {reason}")
        raise AssertionError("xla runs anywhere")


@functools.cache
def log_choice(
    op: str, name: str, device: Device, passed_over: tuple[str, ...]
) -> None:
    """Say once what `auto` took on a device, and why not what comes before it."""
    because = f" ({'; '.join(passed_over)})" if passed_over else ""
    _log.info("%s: implementation='auto' is %r on %s%s", op, name, device, because)
