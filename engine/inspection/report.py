"""The numbers, doubts and repetitions of a data set, in lines."""

from collections.abc import Sequence

import numpy as np

from engine.data.pair_tokens import Limits, PairTokens
from engine.data.rows import PreferenceRows
from engine.inspection.screen import LABEL, Screen
from engine.inspection.similar import NEAR, SHINGLE, Match, Shared, Similar
from engine.inspection.summary import Batches, Lengths, Parts, Summary

_BINS = 12  # lines of a histogram
_COLUMNS = ("least", "median", "mean", "p95", "most")


def print_summary(
    screen: Screen,
    title: str,
    rows: PreferenceRows,
    pairs: PairTokens,
    summary: Summary,
    limits: Limits,
) -> None:
    """Where the rows come from, what is dropped and cut, and how long the rest is."""
    screen.heading(title)
    for number, source in enumerate(rows.sources):
        count = int((rows.source_ids == number).sum())
        screen.item("source", f"{source.name}: {_many(count, 'row')}")
    screen.item("pairs", f"{summary.pairs:,}, of {_many(summary.rows, 'row')}")
    for reason, count, first in pairs.drops:
        share = _share(count, summary.pairs + pairs.dropped + pairs.weightless)
        said = f"{_many(count, 'pair')} ({share}): {reason} (the first: "
        screen.item("dropped", f"{said}{origin(rows, first)})", "bold red")
    if not pairs.drops:
        screen.item("dropped", "no pair")
    _print_cut(screen, summary, limits)
    _print_scored(screen, summary)
    if summary.weights != (1, 1):
        low, high = summary.weights
        screen.item("weights", f"pairs count {low:g} to {high:g} times")
    screen.line()
    _print_lengths(screen, summary.lengths)


def origin(rows: PreferenceRows, row: int) -> str:
    """Where a row is from: its number, where there is one source."""
    return f"row {row}" if len(rows.sources) == 1 else rows.where(row)


def _print_cut(screen: Screen, summary: Summary, limits: Limits) -> None:
    if not summary.pairs_cut:
        screen.item("cut", f"no token ({_limits(limits)})")
        return
    pairs, tokens = summary.pairs_cut, summary.tokens_cut
    screen.item(
        "cut",
        f"{_many(pairs, 'pair')} ({_share(pairs, summary.pairs)}), "
        f"{_many(tokens, 'token')} ({_share(tokens, tokens + summary.tokens)}), by "
        + _limits(limits),
    )
    for name, side in summary.sides.items():
        screen.item(
            f"  {name}",
            f"{side.cut_in_front:,} in front, {side.cut_behind:,} behind (which lose "
            "the end of the text)",
        )


def _print_scored(screen: Screen, summary: Summary) -> None:
    share = _share(summary.scored, summary.tokens)
    screen.item("scored", f"{summary.scored:,} of {summary.tokens:,} tokens ({share})")
    for name, side in summary.sides.items():
        unscored = side.completion - side.scored
        if unscored:
            screen.item(
                f"  {name}",
                f"{side.scored:,} of the completions' {side.completion:,}; "
                f"{unscored:,} are read only",
            )
    more = "longer" if summary.mean_difference >= 0 else "shorter"
    screen.item(
        "longer",
        f"chosen in {summary.chosen_longer:.1%} of pairs, rejected in "
        f"{summary.rejected_longer:.1%}; in the mean chosen is "
        f"{abs(summary.mean_difference):.1f} tokens {more} (before cutting)",
    )


def _print_lengths(screen: Screen, lengths: dict[str, Lengths]) -> None:
    screen.line("tokens".ljust(LABEL) + "".join(f"{name:>10}" for name in _COLUMNS))
    for name, found in lengths.items():
        values = (found.least, found.median, found.mean, found.p95, found.most)
        shown = "".join(f"{value:10,.{int(i == 2)}f}" for i, value in enumerate(values))
        screen.line(name.ljust(LABEL) + shown)


def print_histogram(screen: Screen, found: Parts) -> None:
    """How long the longer whole sequence of pairs is, before cutting."""
    low, high = int(found.longest.min()), int(found.longest.max())
    usual = int(np.percentile(found.longest, 99))
    if high - low <= 2 * (usual - low):
        usual = high
    width = round_width(usual - low, _BINS)
    edges = np.arange(low // width * width, usual + width + 1, width)
    labels = [f"{a:,}-{a + width - 1:,}" for a in edges[:-1].tolist()]
    if high >= edges[-1]:  # a few that are much longer share the last line
        labels.append(f"{edges[-1]:,} on")
        edges = np.append(edges, high + 1)
    counts, _ = np.histogram(found.longest, edges)
    numbers = [f"{count:,}" for count in counts.tolist()]
    label, number = (max(map(len, words)) for words in (labels, numbers))
    room = screen.width - label - number - 4
    screen.line()
    screen.line("pairs by the tokens of their longer sequence, before cutting")
    for name, count, said in zip(labels, counts.tolist(), numbers, strict=True):
        bar = "#" * -(-count * room // int(counts.max()))
        screen.line(f"{name:>{label}}  {said:>{number}}  {bar}".rstrip())


def round_width(span: int, bins: int) -> int:
    """A round number of tokens, of which at most so many are as long as `span`."""
    least = span // bins + 1
    widths = (10**power * step for power in range(19) for step in (1, 2, 5))
    return next(width for width in widths if width >= least)


def print_similar(
    screen: Screen, rows: PreferenceRows, pairs: PairTokens, found: Similar
) -> None:
    """Pairs that repeat or contradict earlier ones."""
    screen.item("prompts", f"{found.prompts:,} different")

    def say(label: str, match: Match, what: str, style: str) -> None:
        if not match.number:
            screen.item(label, f"no pairs {what}")
            return
        first, of = (origin(rows, int(pairs.rows[p])) for p in (match.first, match.of))
        share = _share(match.number, len(pairs))
        screen.item(
            label,
            f"{_many(match.number, 'pair')} ({share}) {what} (the first: {first}, as "
            f"{of})",
            style,
        )

    say("equal", found.equal, "with the tokens of an earlier one", "bold yellow")
    say(
        "near",
        found.near,
        f"with {NEAR:.0%} or more of an earlier one's runs of {SHINGLE} tokens "
        "(estimated; what many prompts share is not counted)",
        "bold yellow",
    )
    say(
        "swapped",
        found.swapped,
        "with an earlier one's answers the other way round",
        "bold red",
    )


def print_shared(
    screen: Screen, rows: PreferenceRows, pairs: PairTokens, found: Shared
) -> None:
    """What the evaluation shares with the training data."""
    for what, match in (("pairs", found.pairs), ("prompts", found.prompts)):
        said = f"no {what} that are in the training data too"
        if match.number:
            said = (
                f"the {what} of {match.number:,} ({_share(match.number, len(pairs))}) "
                "are in the training data too (the first: "
                f"{origin(rows, int(pairs.rows[match.first]))})"
            )
        screen.item("leaked", said, "bold red" if match.number else "")


def print_batches(screen: Screen, found: Batches) -> None:
    """Shapes, steps, and what padding costs."""
    screen.heading("batches")
    screen.item(
        "steps",
        f"{found.steps:,} batches of {_many(found.pairs_per_batch, 'pair')}, "
        f"{found.steps_per_epoch:,} an epoch",
    )
    _print_shapes(screen, found, "the first epoch's batches")


def print_stream_batches(screen: Screen, found: Batches, steps: int, rows: int) -> None:
    """The same of a run whose data is streamed, as far as its first rows tell."""
    screen.heading("batches")
    pairs = _many(found.pairs_per_batch, "pair")
    screen.item("steps", f"{steps:,} batches of {pairs}, streamed")
    _print_shapes(screen, found, f"the batches of the first {_many(rows, 'row')}")


def _print_shapes(screen: Screen, found: Batches, which: str) -> None:
    for length, capacity, count in found.shapes:
        screen.item(
            "shape",
            f"{count:,} of {which}: rows of {length:,} tokens, up to "
            f"{capacity:,} scored on a device",
        )
    screen.item(
        "padding",
        f"{found.padding:.1%} of the tokens that go through the model; of those for "
        f"the head {found.scored_padding:.1%}, which it skips",
    )


def print_findings(
    screen: Screen, warnings: Sequence[str], notes: Sequence[str]
) -> None:
    """What to look at."""
    screen.heading("warnings")
    if not warnings:
        screen.line("none")
    for warning in warnings:
        screen.item("warning", warning, "bold red")
    for note in notes:
        screen.item("note", note)


def _limits(limits: Limits) -> str:
    named = [
        f"{name}={value}"
        for name, value in limits._asdict().items()
        if value is not None
    ]
    return ", ".join(named)


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.1%}"
