"""Draw time and peak memory against V and against T from the rows of a run.

    python -m bench.gpu.plot [ROWS] [DIRECTORY]

By default from bench/results/gpu.json, into docs/.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import NullLocator, ScalarFormatter  # noqa: E402

from bench import rows  # noqa: E402
from bench.device import plan  # noqa: E402
from bench.gpu import sizes  # noqa: E402

NAME = "gpu-time-and-memory.png"
OURS = "dpo_kernels"
# Ours in one strong colour a backend; each peer a colour and marker of its own.
OUR_STYLES = {
    "mosaic_gpu": {"color": "#c1121f", "marker": "o"},
    "triton": {"color": "#f4820b", "marker": "s"},
    "xla": {"color": "#8d5a97", "marker": "D"},
}
PEER_STYLES = [
    {"color": color, "marker": marker, "linestyle": "--", "linewidth": 1.2}
    for color, marker in zip(
        ("#1f77b4", "#17becf", "#2ca02c", "#7f7f7f", "#bcbd22", "#000000", "#0b3c8c"),
        ("^", "v", "<", ">", "p", "x", "P"),
        strict=True,
    )
]


def lines(found: Sequence[rows.Row]) -> dict[str, list[rows.Row]]:
    """The rows of each line: ours by default workspace, and every peer."""
    out: dict[str, list[rows.Row]] = {}
    for row in found:
        setting = row.get("setting") or ""
        ours = row["implementation"].startswith(OURS)
        wanted = setting == plan.mib(plan.WORKSPACE) if ours else not setting
        comparable = "note" not in row
        if row["op"] == plan.GRADIENT and row["ms"] and wanted and comparable:
            out.setdefault(row["implementation"], []).append(row)
    first = [name for name in out if name.startswith(OURS)]
    return {name: out[name] for name in [*first, *(n for n in out if n not in first)]}


def style_of(name: str, position: int) -> dict[str, Any]:
    """A line's looks."""
    if name.startswith(OURS):
        looks = OUR_STYLES[name.removeprefix(OURS).strip()]
        return {"linewidth": 2.4, "zorder": 3} | looks
    return PEER_STYLES[position % len(PEER_STYLES)]


def points(
    found: Sequence[rows.Row], letter: str, main: plan.Shape, value: str
) -> list[tuple[int, float]]:
    """A line's points where only `letter` differs from the main shape."""
    fixed = {k: x for k, x in zip("TDV", main, strict=True) if k != letter}
    return sorted(
        {
            row[letter]: row[value]
            for row in found
            if row[value] is not None and all(row[k] == x for k, x in fixed.items())
        }.items()
    )


def draw_panel(
    axes: Axes,
    found: dict[str, list[rows.Row]],
    letter: str,
    main: plan.Shape,
    value: str,
) -> None:
    """One panel: `value` of every line against `letter`."""
    scale = 1.0 if value == "ms" else 2.0**-30
    ticks: set[int] = set()
    peers = [name for name in found if not name.startswith(OURS)]
    for name, some in found.items():
        pairs = points(some, letter, main, value)
        if not pairs:
            continue
        xs = [x for x, _ in pairs]
        ticks |= set(xs)
        position = peers.index(name) if name in peers else 0
        axes.plot(
            xs,
            [y * scale for _, y in pairs],
            label=name,
            markersize=5,
            **style_of(name, position),
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted(ticks), [f"{x:,}" for x in sorted(ticks)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.tick_params(axis="x", labelrotation=30)
    axes.grid(True, which="both", alpha=0.25)
    word = {"V": "vocabulary V", "T": "scored tokens T"}[letter]
    axes.set_xlabel(f"{word} (log scale)")
    unit = "time, ms" if value == "ms" else "peak memory, GiB"
    axes.set_ylabel(f"{unit} (log scale)")
    fixed = [f"{k} = {x:,}" for k, x in zip("TDV", main, strict=True) if k != letter]
    axes.set_title(", ".join(fixed), fontsize=10)


def draw(found: Sequence[rows.Row], path: Path) -> None:
    """The four panels, in one file."""
    some = lines(found)
    one = next(iter(some.values()))[0]
    main = (sizes.REHEARSAL if one.get("rehearsal") else sizes.REAL).main
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 9), layout="constrained")
    for column, letter in enumerate("VT"):
        for line, value in enumerate(("ms", "peak_bytes")):
            draw_panel(panels[line][column], some, letter, main, value)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(
        "Log-probabilities of the targets and both gradients, bfloat16\n"
        f"{one['device']}, jax {one['jax']}, {one['date'][:10]}, commit {one['commit']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Draw, and say where."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.plot")
    parser.add_argument("rows", nargs="?", type=Path, default=rows.RESULTS / "gpu.json")
    parser.add_argument("directory", nargs="?", type=Path, default=rows.ROOT / "docs")
    args = parser.parse_args(argv)
    found = rows.read(args.rows)
    if not lines(found):
        print(f"{args.rows} has no times to draw")
        return 1
    draw(found, args.directory / NAME)
    print("drew", args.directory / NAME)
    return 0


if __name__ == "__main__":
    sys.exit(main())
