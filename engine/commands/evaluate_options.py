"""The options of `dpo evaluate`, which needs no library to read them."""

import argparse
from typing import NamedTuple

from engine.paths import expand

DESCRIPTION = """\
Every metric of a trained model on the run file's eval_mixture, against the run's
reference, each with its 95 % confidence interval: a table, and a JSON file.
"""


class EvaluateOptions(NamedTuple):
    """What `dpo evaluate` scores, and where the numbers go."""

    model: str | None = None  # None: what training has left in save_directory
    train: bool = False  # the training data as well
    output: str | None = None  # None: evaluation.json in save_directory


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declares them."""
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="a model, or an adapter on the run's; default: save_directory",
    )
    parser.add_argument(
        "--train", action="store_true", help="score the training data (mixture) too"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where the JSON goes; default: evaluation.json in save_directory",
    )


def read_options(arguments: argparse.Namespace) -> EvaluateOptions:
    """The options of a parsed command line."""
    return EvaluateOptions(
        model=arguments.model and expand(arguments.model),
        train=arguments.train,
        output=arguments.output and expand(arguments.output),
    )
