"""The options of commands that compute, of a run in several processes."""

import argparse

from engine.errors import InputError
from engine.parallel.launch import TIMEOUT, Launch

COMMANDS = ("train", "precompute", "evaluate", "run")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares them."""
    group = parser.add_argument_group(
        "several processes",
        "Found in the environment on Cloud TPU, SLURM, Open MPI and Kubernetes; "
        "elsewhere each process is told (docs/processes.md).",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 is met"
    )
    group.add_argument("--num-processes", metavar="N", help="how many there are")
    group.add_argument("--process-id", metavar="I", help="which one this is, from 0 on")
    group.add_argument(
        "--initialization-timeout",
        metavar="SECONDS",
        help=f"in which all must have come ({TIMEOUT:g})",
    )


def read_options(arguments: argparse.Namespace) -> Launch:
    """The options of a parsed command line.

    Raises:
        InputError: a number that is none.
    """
    number, process = arguments.num_processes, arguments.process_id
    seconds = arguments.initialization_timeout
    return Launch(
        coordinator=arguments.coordinator,
        num_processes=_whole("--num-processes", number, least=1),
        process_id=_whole("--process-id", process, least=0),
        timeout=float(_whole("--initialization-timeout", seconds, least=1) or TIMEOUT),
    )


def _whole(option: str, word: str | None, least: int) -> int | None:
    if word is None:
        return None
    if not (word.isascii() and word.isdecimal() and len(word) < 10):
        raise InputError(f"{option}: {word!r} is no whole number; give one")
    if int(word) < least:
        raise InputError(f"{option}: {word} is too few; give {least} or more")
    return int(word)
