"""The stages in which other libraries handle a user's data: what they raise, one line.

Only calls of other libraries stand in a stage, so that our own defects keep their
traceback.
"""

import contextlib
from collections.abc import Iterator

import datasets
import yaml
from datasets.exceptions import DatasetGenerationError

from engine.errors import library_errors, one_line, shortened


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """The stage in which libraries read data: what they may raise becomes one line.

    Only calls of other libraries stand in it, so that defects of ours keep their
    traceback. `what` begins the line: what is read, and as which type.
    """
    bars = datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # ours say it once
    try:
        with library_errors(lambda error: f"{what}: {_reason(error)}"):
            yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, or what it means where that says nothing."""
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, yaml.YAMLError):
        return f"its data card, README.md, is no valid YAML ({one_line(error)})"
    lines = str(error).strip().splitlines()
    reason = shortened(lines[0]) if lines else type(error).__name__
    if "BatchSize must be greater than 0" in reason:
        return "one of its files has no rows; leave it out"
    if "corresponds to no data" in reason:
        return "the split that is asked for holds no rows; name another in split"
    if "Config name is missing" in reason:
        choices = f" ({shortened(' '.join(lines[1:]))})" if lines[1:] else ""
        return f"it holds several data sets; name one in dataset_split_name{choices}"
    if "Couldn't cast" in reason or "column names don't match" in reason:
        return (
            "its files, or rows, have columns of different types; give each type of "
            "file an entry of its own in informs, by data_files"
        )
    if isinstance(error, KeyError):
        return f"there is no {reason}"
    return reason


def tokenising(what: str) -> contextlib.AbstractContextManager[None]:
    """The stage in which the tokenizer encodes texts; `what` begins the line."""
    return library_errors(
        lambda error: (
            f"{what}: the tokenizer cannot encode them ({one_line(error)}); correct "
            "the rows, or name another tokenizer"
        )
    )
