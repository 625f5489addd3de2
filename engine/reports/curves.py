"""Curves as inline SVG, drawn without a library, and the values behind them."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from engine.reports.runs import Points

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 8, 24  # the margins around the plot
MOST_POINTS = 600  # of a curve; a page of long runs stays small


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve."""

    label: str
    colour: int  # of the page's palette
    points: Points
    marked: bool = False  # an evaluation's: thicker, with dots
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves that share a pair of axes."""

    title: str
    unit: str
    series: Sequence[Series]
    limits: tuple[float, float] | None = None  # of the values; None: what they span
    line: float | None = None  # a value to draw a line at

    def values(self) -> dict[str, Any]:
        """What the page's script shows of it."""
        low, high = self.span(0)
        return {
            "x": [low, high],
            "series": [
                {"label": s.label, "colour": s.colour, "points": s.points}
                for s in self.series
            ],
        }

    def span(self, axis: int) -> tuple[float, float]:
        """The least and the largest of the steps (0) or the values (1) drawn."""
        if axis == 1 and self.limits is not None:
            return self.limits
        drawn = [(x, y) for s in self.series for x, y in s.points if y is not None]
        found = [point[axis] for point in drawn]
        if axis == 1 and self.line is not None:
            found.append(self.line)
        low, high = (min(found), max(found)) if found else (0.0, 1.0)
        margin = (high - low) * (0.04 if axis else 0) or (abs(low) * 0.05 or 0.5)
        if axis == 1 or low == high:
            return low - margin, high + margin
        return low, high


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most about so many of them: of each stretch the least and the largest value.

    The first and the last one stay, and each that stays is as it was.
    """
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        indices = range(start, min(start + size, len(points)))
        drawn = [i for i in indices if points[i][1] is not None]
        if len(drawn) < len(indices):  # a gap stays one
            kept.add(next(i for i in indices if points[i][1] is None))
        if drawn:
            kept |= {
                min(drawn, key=lambda i: points[i][1] or 0.0),
                max(drawn, key=lambda i: points[i][1] or 0.0),
            }
    return [points[i] for i in sorted(kept)]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, at most so many."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A number in a few characters."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e9 or size < 1e-3:
        return re.sub(r"\.?0*e\+?(-?)0*", r"e\1", f"{value:.2e}")
    for bound, letter in ((1e6, "M"), (1e4, "k")):
        if size >= bound:
            return f"{value / (1e3 if letter == 'k' else bound):.4g}{letter}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class _Frame:
    """From steps and values to places in the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at_x(self, step: float) -> float:
        low, high = self.x
        return LEFT + (step - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def at_y(self, value: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def svg(chart: Chart, name: str) -> str:
    """The drawing; `name` leads the page's script to its values."""
    frame = _Frame(chart.span(0), chart.span(1))
    parts = [*_axes(frame)]
    if chart.line is not None:
        y = f"{frame.at_y(chart.line):.1f}"
        parts.append(
            f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        )
    for series in sorted(chart.series, key=lambda s: s.marked):
        parts.extend(_curve(series, frame))
    title = escape(f"{chart.title}: {', '.join(s.label for s in chart.series)}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" data-chart="{name}" role="img" '
        f'aria-label="{title}">{"".join(parts)}<line class="cursor" '
        f'y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
    )


def _axes(frame: _Frame) -> Iterator[str]:
    for value in ticks(*frame.y, 5):
        y = f"{frame.at_y(value):.1f}"
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text class="y" x="{LEFT - 6}" y="{y}">{short(value)}</text>'
    for step in ticks(*frame.x, 5):
        if step == int(step):
            x = f"{frame.at_x(step):.1f}"
            yield f'<text class="x" x="{x}" y="{HEIGHT - 8}">{short(step)}</text>'


def _curve(series: Series, frame: _Frame) -> Iterator[str]:
    style = f"c{series.colour}" + " marked" * series.marked + " dashed" * series.dashed
    path = "".join(_path(series.points, frame))
    yield f'<path class="{style}" d="{path}"/>'
    drawn = [(x, y) for x, y in series.points if y is not None]
    if series.marked or len(drawn) == 1:
        few = len(drawn) <= 60
        for step, value in drawn:
            yield (
                f'<circle class="c{series.colour}" cx="{frame.at_x(step):.1f}" '
                f'cy="{frame.at_y(value):.1f}" r="{2.2 if few else 1.2}"/>'
            )


def _path(points: Iterable[tuple[float, float | None]], frame: _Frame) -> Iterator[str]:
    pen = "M"
    for step, value in points:
        if value is None:  # a gap
            pen = "M"
            continue
        yield f"{pen}{frame.at_x(step):.1f},{frame.at_y(value):.1f}"
        pen = "L"
