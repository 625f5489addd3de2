"""What a user can get wrong: one exception, and where libraries' own become it."""

import contextlib
import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_LONGEST = 300  # characters of another library's words
_OURS = tuple(
    str(Path(__file__).parents[1] / package) + os.sep
    for package in ("engine", "dpo_kernels")
)
_PASSED_ON = (MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit)


class InputError(ValueError):
    """Bad input, in one line: what was given, where, what is allowed, what to do.

    The command line prints it as `dpo: error: <message>` and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(self, message: str):
        # A key, a value or a path in it may hold line breaks and control characters,
        # which would be another line, or steer the terminal.
        super().__init__(printable(message))


class Interrupted(KeyboardInterrupt):
    """A signal has ended the run, in good order; says how to go on."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number  # as a shell reports whom a signal ended


@contextlib.contextmanager
def library_errors(explain: Callable[[BaseException], str]) -> Iterator[None]:
    """Turns what a library raises inside into one `InputError`.

    For calls that read or write what the user gave, and nothing else: a library that
    fails there speaks of it, and raises whatever its own libraries do, so no list of
    exceptions is kept beside each call. A defect of our own inside would be taken for
    bad input. DPO_TRACEBACK=1 leaves everything as it is.

    Args:
        explain: the message, from the exception.
    """
    try:
        yield
    except (InputError, *_PASSED_ON):
        raise
    except BaseException as error:  # noqa: BLE001, the one place; panics are no Exception
        if os.environ.get("DPO_TRACEBACK") == "1" or _is_our_assertion(error):
            raise
        raise InputError(explain(error)) from error


def stage(what: str, hint: str = "") -> contextlib.AbstractContextManager[None]:
    """As `library_errors`: `what: <the library's words>; hint`.

    Args:
        what: what cannot be done and to what, as `DIR: the tokenizer cannot be loaded`.
        hint: what to do about it.
    """
    ending = f"; {hint}" if hint else ""
    return library_errors(lambda error: f"{what}: {one_line(error)}{ending}")


def one_line(error: BaseException) -> str:
    """What an exception says, on one line that is not too long."""
    return shortened(str(error)) or type(error).__name__


def shortened(text: str) -> str:
    """On one line that is not too long."""
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def shown(value: Any) -> str:
    """`repr` for a message: on one line, not too long, whatever the value is."""
    try:
        return shortened(repr(value))
    except (ValueError, RecursionError):  # thousands of digits or of levels
        return f"<a {type(value).__name__} too large to print>"


def printable(text: str) -> str:
    """On one line, with escapes for what cannot be seen."""
    text = " ".join(line.strip() for line in text.splitlines())
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def _is_our_assertion(error: BaseException) -> bool:
    """Whether an invariant of ours is broken; a library's own counts as its word.

    (JAX asserts that the device of JAX_PLATFORMS is there.)
    """
    frames = traceback.extract_tb(error.__traceback__)
    where = frames[-1].filename if frames else ""
    library = "site-packages" in Path(where).parts and not where.startswith(_OURS)
    return isinstance(error, AssertionError) and not library
