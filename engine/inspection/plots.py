"""Histograms of lengths as a PNG, which replaces none but an earlier one of ours."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InputError, stage
from engine.inspection.summary import Parts

_SOFTWARE = "dpo inspect"  # written into each file: who may replace it
_PNG = b"\x89PNG\r\n\x1a\n"
_HEAD = 4096  # bytes of a file in which that is found
_PROMPT, _CHOSEN, _REJECTED, _GREY = "#4c72b0", "#55a868", "#c44e52", "#777777"
_WAY_OUT = "give another directory with --plots, or --no-plots"
_MOST_BINS = 60


def missing_library() -> str | None:
    """Why nothing can be drawn here; None: it can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed: pip install matplotlib draws the lengths"
    return None


def plot_lengths(
    directory: Path, name: str, title: str, found: Parts, max_length: int | None
) -> Path:
    """Draws the lengths of pairs, before cutting, into directory/name.

    Raises:
        InputError: a file of that name is not from here; it cannot be written.
    """
    path = directory / name
    _check_ours(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(11, 7.5), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, parse_math=False)
        (prompt, answers), (whole, difference) = figure.subplots(2, 2)
        _histogram(prompt, "prompts", [("prompt", found.prompt, _PROMPT)])
        sides = [
            ("chosen", found.chosen, _CHOSEN),
            ("rejected", found.rejected, _REJECTED),
        ]
        _histogram(answers, "completions", sides)
        _histogram(whole, "longer side of each pair", [("pair", found.longest, _GREY)])
        if max_length is not None:
            beyond = int((found.longest > max_length).sum())
            label = f"max_length {max_length:,}: {beyond:,} are longer"
            whole.axvline(max_length, color="black", ls="--", label=label)
            whole.legend()
        minus = [("difference", found.chosen - found.rejected, _GREY)]
        _histogram(difference, "chosen minus rejected", minus)
        difference.axvline(0, color="black", lw=1)
        with stage(f"{path}: the plot cannot be written", _WAY_OUT):
            directory.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=110, metadata={"Software": _SOFTWARE})
    return path


def _histogram(
    axes: Any, title: str, series: Sequence[tuple[str, np.ndarray, str]]
) -> None:
    """Filled steps of (label, values, colour), over shared bins of whole tokens."""
    low = min(int(values.min()) for _, values, _ in series)
    high = max(int(values.max()) for _, values, _ in series) + 1
    width = max(-(-(high - low) // _MOST_BINS), 1)
    edges = np.arange(low, high + width, width)
    for label, values, colour in series:
        axes.hist(values, edges, histtype="stepfilled", alpha=0.3, color=colour)
        axes.hist(values, edges, histtype="step", color=colour)
        median = np.median(values)
        axes.axvline(median, color=colour, ls=":", label=f"{label}, median {median:,g}")
    axes.set(title=title, xlabel="tokens", ylabel="pairs")
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper right")


def _check_ours(path: Path) -> None:
    with stage(f"{path} cannot be looked at", _WAY_OUT):
        if path.is_symlink() and not path.exists():
            raise InputError(f"{path} is a link to nothing; {_WAY_OUT}")
        if not path.exists():
            return
        head = path.read_bytes()[:_HEAD] if path.is_file() else b""
    if not (head.startswith(_PNG) and f"Software\0{_SOFTWARE}".encode() in head):
        raise InputError(f"{path} is not a plot of `dpo inspect`; {_WAY_OUT}")
