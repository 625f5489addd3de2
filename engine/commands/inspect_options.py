"""The options of `dpo inspect`, which needs no library to read them."""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from engine.errors import InputError
from engine.paths import expand

_SHOWN = 3  # rows that are shown unless something else is asked for
DESCRIPTION = """\
Show what the model will see of a run file's data: the tokens of some rows, which of
them are scored and which are cut; lengths, dropped rows, near-duplicates, and what is
wrong with the chat template, BOS and EOS. Loads no weights and trains nothing.
"""


class InspectOptions(NamedTuple):
    """What `dpo inspect` shows besides the numbers."""

    rows: tuple[int, ...] | None = None  # of the mixture; None: `num`, spread over it
    num: int = _SHOWN
    evaluation: bool = False  # rows of eval_mixture
    ids: bool = False
    full: bool = False
    plots: str | None = None  # a directory; None: `inspect` in save_directory
    no_plots: bool = False


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares them."""
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument(
        "--rows", metavar="0,5,17", help="show these rows of the mixture, from 0 on"
    )
    rows.add_argument(
        "--num",
        metavar="N",
        help=f"show so many rows, spread over the mixture ({_SHOWN}; 0: none)",
    )
    parser.add_argument(
        "--eval", action="store_true", help="show rows of eval_mixture instead"
    )
    parser.add_argument("--ids", action="store_true", help="show each token's id")
    parser.add_argument(
        "--full", action="store_true", help="show every line of long texts"
    )
    plots = parser.add_mutually_exclusive_group()
    plots.add_argument(
        "--plots",
        metavar="DIR",
        help="where histograms go (PNG); default: inspect in save_directory",
    )
    plots.add_argument("--no-plots", action="store_true", help="draw no histograms")


def read_options(arguments: argparse.Namespace) -> InspectOptions:
    """The options of a parsed command line.

    Raises:
        InputError: a number of a row that is none.
    """
    rows = None
    if arguments.rows is not None:
        rows = tuple(
            dict.fromkeys(
                _number("--rows", word, "row numbers from 0 on, such as 0,5,17")
                for word in arguments.rows.split(",")
            )
        )
    num = _SHOWN
    if arguments.num is not None:
        num = _number("--num", arguments.num, "how many rows to show, 0 or more")
    return InspectOptions(
        rows=rows,
        num=num,
        evaluation=arguments.eval,
        ids=arguments.ids,
        full=arguments.full,
        plots=None if arguments.plots is None else expand(arguments.plots),
        no_plots=arguments.no_plots,
    )


def _number(option: str, word: str, rule: str) -> int:
    if not word.strip().isdecimal() or len(word) > 12:
        raise InputError(f"{option}: {word!r} is no number; give {rule}")
    return int(word)


def check_rows(rows: Sequence[int], count: int) -> None:
    """Refuses rows that are not there.

    Raises:
        InputError: naming the first.
    """
    for row in rows:
        if row >= count:
            raise InputError(
                f"--rows: there is no row {row}; the mixture has {count} rows, counted "
                f"from 0: give at most {count - 1}"
            )
