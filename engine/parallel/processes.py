"""One run in several processes: how they join, what they agree on, how they leave.

Of a single process everything here is what it would be without it.
"""

import atexit
import contextlib
import ctypes
import itertools
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from engine.errors import InputError, Interrupted, stage
from engine.parallel.launch import Launch, find_place
from engine.parallel.meeting import Place, check_place, meet
from engine.parallel.peers import Peers, ProcessGone

logger = logging.getLogger(__name__)

_HEARTBEAT = 100  # seconds without one, after which JAX takes a process for dead
# Seconds in which the end of another process is known, after a collective has failed.
_KNOWN_SOON = 5.0


_peers: Peers | None = None
_labels = itertools.count()


def count() -> int:
    """How many processes the run has."""
    # (`jax.process_count` begins to use the devices.)
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes, shows and reports."""
    return count() == 1 or jax.process_index() == 0


def gather(value: Any, label: str | None = None) -> list[Any]:
    """What each process gives, in order; every process calls this.

    Args:
        value: as JSON has it.
        label: where it is not called in the same order by all: another for each call.
    """
    if count() == 1:
        return [value]
    if _peers is None:
        raise InputError(
            f"JAX has {count()} processes, which this program does not know; call "
            "engine.parallel.processes.join() in place of jax.distributed.initialize()"
        )
    return _peers.gather(label or f"call {next(_labels)}", value)


def note(label: str, words: str) -> None:
    """Let all know something, without waiting for them."""
    if _peers is not None:
        _peers.note(label, words)


def noted(label: str) -> str | None:
    """What some process has let all know."""
    return None if _peers is None else _peers.noted(label)


def first_decides[Value](decide: Callable[[], Value]) -> Value:
    """What process 0 finds, as JSON has it; every process calls this.

    Raises:
        InputError: what it raised there.
    """
    if count() == 1:
        return decide()
    found: dict[str, Any] = {}
    if is_first():
        try:
            found = {"value": decide()}
        except InputError as error:
            gather({"error": str(error)})
            raise
    found = gather(found)[0]
    if "error" in found:
        raise InputError(found["error"])
    return found["value"]


@contextlib.contextmanager
def first_goes_first() -> Iterator[None]:
    """Process 0 does what is inside before the others: they find what it has kept."""
    if not is_first():
        gather(None)
    yield
    if is_first():
        gather(None)


def of_first(array: np.ndarray) -> np.ndarray:
    """Process 0's array, bit for bit; every process calls this with one of its size."""
    if count() == 1:
        return array
    bits = multihost_utils.broadcast_one_to_all(array.view(np.uint8))
    return np.array(bits).view(array.dtype)


def check_same(facts: dict[str, Any], what: str) -> None:
    """Refuse processes that were started with other facts than process 0.

    Raises:
        InputError: with the first that differs.
    """
    everyone = gather(facts)
    for process, theirs in enumerate(everyone):
        for name in dict.fromkeys((*everyone[0], *theirs)):
            first, other = everyone[0].get(name), theirs.get(name)
            if first != other:
                raise InputError(
                    f"{what}: {name} is {other!r} in process {process} and {first!r} "
                    "in process 0; start all processes with the same"
                )


@contextlib.contextmanager
def joined(launch: Launch) -> Iterator[None]:
    """Inside, this process is one of the run's, if the run has several.

    An error is told to the others, which end as well; they end together, if all is well
    or a signal was obeyed.
    """
    join(launch)
    if _peers is None:
        yield
        return
    try:
        yield
    except Interrupted:
        _leave(0, "")
        raise
    except BaseException as error:
        gone = _reason(error)
        _leave_with(error if gone is None else gone)
        if gone is None or gone is error:
            raise
        raise gone from error
    gone = _leave(0, "")
    if gone is not None:
        raise gone


def join(launch: Launch = Launch()) -> None:  # noqa: B008, it is immutable
    """Become one of the processes of a run, before JAX is used.

    Raises:
        InputError: a process that did not come in time, with its number or its address.
    """
    global _peers
    found = find_place(launch)
    if found is None:
        return
    place, device_ids = found
    check_place(place)
    logger.info("%s: meeting the others at %s", place, place.address)
    lines = meet(place, launch.timeout)
    _say_so_when_jax_aborts(place)
    # It would take SIGTERM for itself, of which `Agreement` tells the others.
    jax.config.update("jax_enable_preemption_service", False)
    with stage(f"{place}: JAX cannot begin ({place.address})"):
        jax.distributed.initialize(
            place.address,
            place.processes,
            place.process,
            local_device_ids=device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=int(launch.timeout) + 1,
            heartbeat_timeout_seconds=_HEARTBEAT,
        )
    _peers = Peers(place, lines)
    atexit.register(_leave_at_exit)
    _log_as_one_of_several(place)


def _reason(error: BaseException) -> ProcessGone | None:
    """The end of another process, if that is what this error comes from."""
    assert _peers is not None
    if isinstance(error, InputError) and error.__cause__ is None:
        return None  # our own words
    failed = jax.errors.JaxRuntimeError
    if isinstance(error, failed) or isinstance(error.__cause__, failed):
        return _peers.expect_failure(_KNOWN_SOON)
    return _peers.failure


def _leave_with(error: BaseException) -> None:
    code = {KeyboardInterrupt: 130, BrokenPipeError: 141}.get(type(error), 1)
    if isinstance(error, InputError):
        code = error.exit_code
    _leave(code, " ".join(str(error).split()) or type(error).__name__)


def _leave_at_exit() -> None:
    """Of a program that has called `join`, and ends."""
    if _peers is None:
        return
    error = getattr(sys, "last_exc", None)  # that nobody has caught
    if error is None:
        _leave(0, "")
        return
    _leave_with(error)
    _end(1)


def _leave(code: int, words: str) -> ProcessGone | None:
    """Leave the others, in good order or (code) otherwise."""
    global _peers
    assert _peers is not None
    if code:
        _aborted.code, _aborted.words = code, f"dpo: error: {words}\n"
    gone, _peers = _peers.leave(code, words), None
    _aborted.words = ""  # who called us says it
    if code or gone is not None:
        # JAX would wait for the others at Python's exit, for minutes.
        atexit.register(_end, gone.exit_code if gone is not None else code)
    else:
        jax.distributed.shutdown()
    return gone


def _end(code: int) -> None:
    for stream in sys.stdout, sys.stderr:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def _log_as_one_of_several(place: Place) -> None:
    """Process 0 says everything, the others what only they can know."""
    if place.process == 0:
        return
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(f"{place}: %(message)s"))
    logging.getLogger("engine").setLevel(logging.ERROR)
    logging.getLogger("engine.training.signals").setLevel(logging.WARNING)


@dataclass
class _Aborted:
    """How this process ends where JAX aborts it."""

    words: str = ""
    code: int = ProcessGone.exit_code


_aborted = _Aborted()


def _say_so_when_jax_aborts(place: Place) -> None:
    """JAX ends a process by SIGABRT where another is lost: the last line is ours then.

    In C's own handler: Python's would run in a thread that may wait for ever.
    """
    _aborted.words = (
        f"dpo: error: {place}: JAX has ended this process, for the reason above: most "
        "often, as another process has gone; start all again to go on from the newest "
        "checkpoint\n"
    )

    def end(number: int) -> None:
        del number
        os.write(2, _aborted.words.encode())
        os._exit(_aborted.code)

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _kept.append(kind(end))  # for as long as the process lives
    library = ctypes.CDLL(None)
    library.signal.argtypes = ctypes.c_int, kind
    library.signal.restype = ctypes.c_void_p
    library.signal(signal.SIGABRT, _kept[-1])


_kept: list[Any] = []
