"""One self-contained HTML page of one or several runs."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from engine.reports.charts import charts, set_name
from engine.reports.curves import HEIGHT, LEFT, RIGHT, WIDTH, Chart, svg
from engine.reports.runs import Run
from engine.reports.style import CSS, SCRIPT

_ALL = "loss", "rewards/margins", "rewards/accuracies"  # in the first table
# Nothing is loaded, whatever stands in a run's files.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_UNSET = "not set"
_COURSE = "first \N{RIGHTWARDS ARROW} last"


def page(runs: Sequence[Run], defaults: Mapping[str, Any]) -> str:
    """The page.

    Args:
        defaults: of the configuration, by dotted key, with index 0 in lists.
    """
    drawn = list(charts(runs))
    title = ", ".join(run.name for run in runs)
    values = {
        "box": {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT},
        "charts": {str(i): chart.values() for i, chart in enumerate(drawn)},
    }
    # No `</script>` in a name may end the element.
    data = json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>',
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>',
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *_notes(runs),
        *_first_table(runs),
        "<h2>Curves</h2>",
        '<p class="soft">Thin: training, each point the mean since the one before. '
        "Thick, with dots: evaluation. Point at a curve, or touch it, for values.</p>",
        '<div class="charts">',
        *(_figure(chart, str(i)) for i, chart in enumerate(drawn)),
        "</div>",
        *_generations(runs),
        *_facts(runs),
        *_configuration(runs, defaults),
        *_every_metric(runs),
        f'<script type="application/json" id="values">{data}</script>',
        f"<script>{SCRIPT}</script></body></html>\n",
    ]
    return "".join(parts)


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        for note in run.notes:
            yield f'<p class="note">{escape(run.name)}: {escape(note)}.</p>'


def _figure(chart: Chart, name: str) -> str:
    keys = "".join(
        f'<span><i class="{"marked" * s.marked} {"dashed" * s.dashed}" '
        f'style="border-color:var(--c{s.colour})"></i>{escape(s.label)}</span>'
        for s in chart.series
    )
    return (
        f"<figure><figcaption>{escape(chart.title)}"
        f'<span class="unit">{escape(chart.unit)}</span></figcaption>'
        f'<div class="keys">{keys}</div>{svg(chart, name)}<div class="tip"></div>'
        "</figure>"
    )


def _first_table(runs: Sequence[Run]) -> Iterator[str]:
    """The last value of what matters most, and the first evaluation's beside it."""
    rows: list[tuple[str, list[str]]] = [
        ("steps", [f"{run.lines[-1]['step']:,}" for run in runs])
    ]
    prefixes = dict.fromkeys(prefix for run in runs for prefix in run.prefixes)
    for prefix in (*(p for p in prefixes if p), ""):
        for metric in _ALL:
            found = [run.points(prefix + metric) for run in runs]
            label = f"{metric.rpartition('/')[2]}, {set_name(prefix)}"
            rows.append((label, [_course(points) for points in found]))
    rates = [_median(run.points("perf/tokens_per_second")) for run in runs]
    rows.append(("tokens/s, the median", rates))
    peaks = [_most(run.points("memory/peak_bytes")) for run in runs]
    if any(peaks):
        rows.append(("most memory of a device", peaks))
    names = [run.name for run in runs] if len(runs) > 1 else [_COURSE]
    yield from _table(["", *names], rows, first="soft")


def _course(points: Sequence[tuple[float, float | None]]) -> str:
    if not points:
        return ""
    first, last = points[0], points[-1]
    if len(points) == 1:
        return _number(last[1])
    return f"{_number(first[1])} \N{RIGHTWARDS ARROW} {_number(last[1])}"


def _median(points: Sequence[tuple[float, float | None]]) -> str:
    values = sorted(value for _, value in points if value is not None)
    return f"{values[len(values) // 2]:,.0f}" if values else ""


def _most(points: Sequence[tuple[float, float | None]]) -> str:
    values = [value for _, value in points if value is not None]
    return f"{max(values) / 2**30:.2f} GiB" if values else ""


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, int) or abs(value) >= 1e5:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _table(
    head: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    first: str = "key",
    cell: str = "number",
) -> Iterator[str]:
    columns = "".join(f'<th class="{cell}">{escape(name)}</th>' for name in head[1:])
    yield f'<div class="scroll"><table><tr><th>{escape(head[0])}</th>{columns}</tr>'
    for label, values in rows:
        cells = "".join(f'<td class="{cell}">{escape(value)}</td>' for value in values)
        yield f'<tr><td class="{first}">{escape(label)}</td>{cells}</tr>'
    yield "</table></div>"


def _generations(runs: Sequence[Run]) -> Iterator[str]:
    """Each prompt once, with what every run's model wrote at each step."""
    prompts = dict.fromkeys(line["prompt"] for run in runs for line in run.generations)
    if prompts:
        yield "<h2>Generations</h2>"
    for prompt in prompts:
        yield f"<blockquote><p><b>{escape(prompt)}</b></p>"
        for run in runs:
            name = "" if len(runs) == 1 else f"{run.name}, "
            lines = [line for line in run.generations if line["prompt"] == prompt]
            for said, text in _answers(lines):
                yield f'<p><span class="soft">{escape(name + said)}:</span> '
                yield f"{escape(text)}</p>"
        yield "</blockquote>"


def _answers(lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Whose answer to a prompt and which; a reference's once where it is the same."""
    before = None
    for line in lines:
        step, reference = f"step {line.get('step')}", line.get("reference")
        if isinstance(reference, str) and reference != before:
            yield "reference" if before is None else f"reference, {step}", reference
            before = reference
        yield step, line["text"]


def _facts(runs: Sequence[Run]) -> Iterator[str]:
    if any(run.facts for run in runs):
        yield "<h2>What was run</h2>"
    for run in runs:
        if run.facts and len(runs) > 1:
            yield f"<h3>{escape(run.name)}</h3>"
        if run.facts:
            rows = run.facts.items()
            pairs = (f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in rows)
            yield f'<dl class="facts">{"".join(pairs)}</dl>'


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _configuration(runs: Sequence[Run], defaults: Mapping[str, Any]) -> Iterator[str]:
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    if not keys:
        return
    yield "<h2>Configuration</h2>"
    known = [run for run in runs if run.config]
    values = {key: [run.config.get(key, _UNSET) for run in known] for key in keys}
    if len(known) > 1:
        differing = [k for k in keys if any(v != values[k][0] for v in values[k])]
        if differing:
            yield "<p>Where the runs differ:</p>"
            head = ["", *(run.name for run in known)]
            rows = [(key, [_shown(v) for v in values[key]]) for key in differing]
            yield from _table(head, rows, cell="value")
        else:
            yield "<p>The runs do not differ.</p>"
        keys = [key for key in keys if key not in differing]
    else:
        changed = [key for key in keys if _differs(key, values[key][0], defaults)]
        yield "<p>What is not at its default:</p>"
        rows = [(key, [_shown(values[key][0])]) for key in changed]
        yield from _table(["", "value"], rows, cell="value")
        keys = [key for key in keys if key not in changed]
    said = "The rest, the same in all runs" if len(known) > 1 else "The defaults"
    yield f"<details><summary>{said}</summary>"
    yield from _table(
        ["", "value"], [(key, [_shown(values[key][0])]) for key in keys], cell="value"
    )
    yield "</details>"


def _differs(key: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    return defaults.get(re.sub(r"\.\d+\.", ".0.", key)) != value


def _every_metric(runs: Sequence[Run]) -> Iterator[str]:
    yield "<h2>Every metric</h2><details><summary>First and last values</summary>"
    names = dict.fromkeys(name for run in runs for name in run.names())
    rows = [(name, [_course(run.points(name)) for run in runs]) for name in names]
    yield from _table(["", *(run.name for run in runs)], rows)
    yield "</details>"
