"""What several processes do at once, in threads, and fails for all if for one."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from engine.errors import InputError
from engine.parallel import processes

_LOOK = 1.0  # seconds between two looks at what the others say


@contextlib.contextmanager
def together(label: str) -> Iterator[None]:
    """What every process does, and fails in for all where it fails in one.

    Raises:
        InputError: the process's own, or else the first one's.
    """
    try:
        yield
    except InputError as error:
        processes.note(label, str(error))
        processes.gather(str(error), label)
        raise
    failed = [words for words in processes.gather(None, label) if words is not None]
    if failed:
        raise InputError(failed[0])


def wait_for(copied: Any, label: str) -> None:
    """Until arrays are written, or another process has failed to write its own.

    (The library would wait for that process for five minutes.)
    """
    while processes.count() > 1:
        began = time.monotonic()
        try:
            return copied.result(timeout=_LOOK)
        except TimeoutError:
            if time.monotonic() - began < _LOOK:
                raise  # its own, of what it waits for
        if (words := processes.noted(label)) is not None:
            raise InputError(words)
    copied.result()
