"""`dpo inspect`: what the model will see of a run file's data."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engine.commands.inputs import RunData, check_destination, prepare_run, read_data
from engine.commands.inspect_options import InspectOptions, check_rows
from engine.config.run import RunConfig
from engine.data.batches import BatchPlan
from engine.errors import InputError
from engine.inspection import plots, report
from engine.inspection.checks import Findings, check_tokens, form_of, stop_ids
from engine.inspection.runs import shown_pairs
from engine.inspection.screen import Screen, screen
from engine.inspection.similar import Digests, digests, shared, similar
from engine.inspection.summary import Parts, batches, parts, summarise
from engine.inspection.tokens import TokenPrinter, View
from engine.models import resolve_directory
from engine.training.plans import plan_training
from engine.training.prepare import EVAL, Prepared

_STREAMED = 1000  # rows that are looked at of a training set that is streamed
_TITLES = {"": "training data", EVAL: "evaluation data"}


def main(run: RunConfig, options: InspectOptions) -> None:
    """Show rows as tokens, then numbers and doubts; load no weights.

    What is wrong with the data is said first, and shown as far as it can be; then
    come the checks that training makes, which may end with an error.

    Raises:
        InputError: whatever training would refuse; rows that are not there.
    """
    if options.evaluation and run.eval_mixture is None:
        raise InputError("--eval: the run file has no eval_mixture; leave it out")
    out = screen()
    warnings: list[str] = []
    notes: list[str] = []
    try:
        with _kept(warnings):
            data = read_data(run, first_rows=_STREAMED)
        if data.stream is not None:
            notes.append(
                f"the training data is streamed: its first {len(data.rows['']):,} rows "
                "are looked at here, and rows after them only when they are trained on"
            )
        _show_rows(out, run, data, options)
        _show_numbers(out, run, data, options, Findings(warnings, notes))
        with _kept(warnings):
            prepared = prepare_run(run, data)
        _show_batches(out, run, data, prepared)
    except InputError:
        if warnings:
            report.print_findings(out, warnings, notes)
        raise
    report.print_findings(out, warnings, notes)


def _show_rows(
    out: Screen, run: RunConfig, data: RunData, options: InspectOptions
) -> None:
    prefix = EVAL if options.evaluation else ""
    rows, pairs = data.rows[prefix], data.pairs[prefix]
    wanted = options.rows
    if wanted is None:
        num = min(options.num, len(rows))
        wanted = np.linspace(0, len(rows) - 1, num).round().astype(int).tolist()
    check_rows(wanted, len(rows))
    if not wanted:
        return
    view = View(ids=options.ids, full=options.full)
    printer = TokenPrinter(out, data.tokenizer, view)
    out.heading(f"rows of the {_TITLES[prefix]} as tokens")
    printer.legend()
    # (Whatever these rows are doubted for has been said of all rows.)
    tools = run.trainer.tools
    with _kept([]):
        shown = [
            pair
            for row in wanted
            for pair in shown_pairs(rows, pairs, data.tokenizer, tools, row)
        ]
    for pair in shown:
        printer.pair(pair)
    out.line()


def _show_numbers(
    out: Screen,
    run: RunConfig,
    data: RunData,
    options: InspectOptions,
    findings: Findings,
) -> None:
    """Prints each data set's, and adds to the findings."""
    stops = stop_ids(data.tokenizer, resolve_directory(run.model.name_or_path))
    known: dict[str, Digests] = {}
    for prefix, pairs in data.pairs.items():
        rows, title = data.rows[prefix], _TITLES[prefix]
        assert pairs.limits is not None
        summary = summarise(pairs, len(rows))
        report.print_summary(out, title, rows, pairs, summary, pairs.limits)
        found = parts(pairs)
        report.print_histogram(out, found)
        if not options.no_plots:
            out.item("drawn in", _plot(run, options, prefix, found))
        out.line()
        known[prefix] = digests(pairs)
        report.print_similar(out, rows, pairs, similar(pairs, known[prefix]))
        if prefix:
            report.print_shared(out, rows, pairs, shared(known[""], known[prefix]))
        more = check_tokens(data.tokenizer, rows, pairs, stops, form_of(rows))
        findings.warnings.extend(f"{title}: {warning}" for warning in more.warnings)
        findings.notes.extend(note for note in more.notes if note not in findings.notes)


def _show_batches(
    out: Screen, run: RunConfig, data: RunData, prepared: Prepared
) -> None:
    plan, pairs = prepared.plan, data.pairs[""]
    if isinstance(plan, BatchPlan):
        report.print_batches(out, batches(pairs, plan))
        return
    # The first rows in the batches of an epoch, but in the stream's shapes.
    once = dataclasses.replace(run.trainer, num_train_epochs=1, drop_last=False)
    found = batches(pairs, plan_training(once, pairs, prepared.mesh), plan.shapes)
    report.print_stream_batches(out, found, plan.steps, len(data.rows[""]))


def _plot(run: RunConfig, options: InspectOptions, prefix: str, found: Parts) -> str:
    """Draws the lengths, and says where, or why not."""
    missing = plots.missing_library()
    if missing is not None:
        if options.plots is not None:
            raise InputError(f"--plots {options.plots}: {missing}")
        return f"no file: {missing}"
    if options.plots is None:
        check_destination(run)
    directory = Path(options.plots or Path(run.trainer.save_directory) / "inspect")
    return str(
        plots.plot_lengths(
            directory,
            f"{prefix}lengths.png",
            f"{_TITLES[prefix]}: tokens of {len(found.prompt):,} pairs, before cutting",
            found,
            run.trainer.max_length,
        )
    )


@contextlib.contextmanager
def _kept(found: list[str]) -> Iterator[None]:
    """Adds the engine's warnings to `found`, for the report, instead of the log."""

    class Keeper(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            ours = record.name.split(".")[0] == "engine"
            if record.levelno < logging.WARNING or not ours:
                return True
            found.append(record.getMessage())
            return False

    # A logger's own filter sees what is logged through it alone, a handler's what
    # reaches it from all.
    keeper = Keeper()
    handlers = logging.getLogger().handlers
    for handler in handlers:
        handler.addFilter(keeper)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(keeper)
