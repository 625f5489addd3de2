"""SIGTERM and Ctrl-C: the step is finished and saved first; a second ends at once."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

logger = logging.getLogger(__name__)

_SIGNALS = signal.SIGINT, signal.SIGTERM


@dataclass
class Stop:
    """The signal that asks the run to end after its step, if there was one."""

    number: signal.Signals | None = None


@contextlib.contextmanager
def finishing_steps(stop: Stop) -> Iterator[None]:
    """Signals are noted in `stop` meanwhile; the second one ends the process.

    In another thread than the main one, which alone is told of signals, they are left
    as they are.
    """
    stop.number = None
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        if stop.number is None:
            stop.number = asked = signal.Signals(number)
            logger.warning(
                "%s: finishing this step and saving; once more ends at once",
                asked.name,
            )
        elif hasattr(sys, "ps1"):  # somebody's own interpreter lives on
            raise KeyboardInterrupt
        else:
            os._exit(128 + number)

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
