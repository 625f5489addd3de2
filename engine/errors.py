"""What a user can get wrong: one exception, and where libraries' own become it."""

import contextlib
import os
import traceback
from collections.abc import Iterator
from pathlib import Path

_OURS = tuple(
    str(Path(__file__).parents[1] / package) + os.sep
    for package in ("engine", "dpo_kernels")
)


class InputError(ValueError):
    """Bad input, in one line: what was given, where, what is allowed, what to do.

    The command line prints it as `dpo: error: <message>` and exits with code 2.
    """


@contextlib.contextmanager
def stage(what: str, hint: str = "") -> Iterator[None]:
    """Turns what a library raises in a stage of a run into one `InputError`.

    For stages that read or write what the user gave: a library that fails there speaks
    of the input. What our own code raises is our own mistake and keeps its traceback.
    With DPO_TRACEBACK=1 everything does.

    Args:
        what: the stage and its object, as `cannot load the tokenizer of DIR`.
        hint: what to do about it.
    """
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # tokenizers' panics are no Exception
        if os.environ.get("DPO_TRACEBACK") == "1" or _is_ours(error):
            raise
        raise InputError(
            f"{what}: {one_line(error)}{'; ' + hint if hint else ''}"
            " (DPO_TRACEBACK=1 shows where)"
        ) from error


def one_line(error: BaseException) -> str:
    """What an exception says, on one line, with its type where that tells more."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError | ValueError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised by our own code, not by a library that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, OSError | MemoryError):
        return False  # the machine's word, wherever it is heard
    return bool(frames) and frames[-1].filename.startswith(_OURS)
