"""The options of `dpo plan`, which needs no library to read them."""

import argparse
from typing import NamedTuple

from engine.errors import InputError
from engine.paths import expand
from engine.planning.targets import EXAMPLES, Target, parse_target

DESCRIPTION = """\
Compile the very step that `dpo train` would run, for devices that need not be here, and
print what it takes of each: memory, arithmetic, communication, a predicted time, and
whether it fits. Of models only config.json is read. Exits with 1 where it does not fit.
"""


class PlanOptions(NamedTuple):
    """What `dpo plan` does besides."""

    target: Target
    sweep: bool = False
    plot: str | None = None  # a file; None: plan.png in save_directory
    json: str | None = None
    data: bool = True  # whether the run's own data says how large batches are
    search: bool = True  # whether changes are looked for that make it fit


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares them."""
    parser.add_argument(
        "--target", metavar="DEVICES", help=f"what to plan for: {EXAMPLES}"
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="compile other meshes and batch sizes too; a table and a plot",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE.png",
        help="where the plot of --sweep goes; default: plan.png in save_directory",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything there, too")
    parser.add_argument(
        "--no-data",
        action="store_true",
        help="read no data: batches are as large as max_length allows",
    )
    parser.add_argument(
        "--no-search",
        action="store_true",
        help="where it does not fit, do not look for changes that make it fit",
    )


def read_options(arguments: argparse.Namespace) -> PlanOptions:
    """The options of a parsed command line.

    Raises:
        InputError: no target, or one that cannot be; a plot of nothing.
    """
    if arguments.target is None:
        raise InputError(
            f"--target is missing: say what to plan for, such as {EXAMPLES}"
        )
    if arguments.plot is not None and not arguments.sweep:
        raise InputError("--plot has no effect without --sweep; remove it or add that")
    if arguments.plot is not None and not arguments.plot.endswith(".png"):
        raise InputError(f"--plot {arguments.plot!r} must end with .png; rename it")
    return PlanOptions(
        target=parse_target(arguments.target),
        sweep=arguments.sweep,
        plot=None if arguments.plot is None else expand(arguments.plot),
        json=None if arguments.json is None else expand(arguments.json),
        data=not arguments.no_data,
        search=not arguments.no_search,
    )
