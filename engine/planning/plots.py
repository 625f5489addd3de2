"""The plot of a sweep as a PNG, which replaces none but an earlier one of ours."""

import importlib.util
from pathlib import Path
from typing import Any

from engine.errors import InputError, stage
from engine.planning.sweep import Point

_SOFTWARE = "dpo plan"  # written into each file: who may replace it
_PNG = b"\x89PNG\r\n\x1a\n"
_HEAD = 4096  # bytes of a file in which that is found
_GIB = 2**30
_WAY_OUT = "give another file with --plot"
_TOP = 4  # times the highest peak, up to which the capacity is drawn


def check_plot(path: Path) -> None:
    """Refuse a file that may not be written, before anything is compiled.

    Raises:
        InputError: no library to draw with; a file that is not from here.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "--sweep draws a plot, and matplotlib is not installed: pip install "
            "matplotlib"
        )
    with stage(f"{path} cannot be looked at", _WAY_OUT):
        if not path.exists() and not path.is_symlink():
            return
        head = path.read_bytes()[:_HEAD] if path.is_file() else b""
    if not (head.startswith(_PNG) and f"Software\0{_SOFTWARE}".encode() in head):
        raise InputError(f"{path} is not a plot of `dpo plan`; {_WAY_OUT}")


def plot_sweep(path: Path, title: str, points: list[Point], capacity: int) -> None:
    """Tokens a second and peak memory over the batch size, a line for each mesh.

    What does not fit is a hollow mark. Of the time both ends are drawn; where none is
    predicted, as for CPUs, memory alone is.

    Raises:
        InputError: it cannot be written.
    """
    check_plot(path)
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3}):
        accounts = [x.account for x in points if x.account is not None]
        panels = 2 if any(x.times for x in accounts) else 1
        figure = Figure(figsize=(6 * panels, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, parse_math=False)
        *speeds, memory = figure.subplots(1, panels, squeeze=False)[0]
        for index, name in enumerate(dict.fromkeys(point.name for point in points)):
            some = [x for x in points if x.name == name and x.account is not None]
            colour = f"C{index % 10}"
            _draw_memory(memory, name, some, colour)
            for speed in speeds:
                _draw_speed(speed, name, some, colour)
        label = f"what there is: {capacity / _GIB:.1f} GiB"
        if capacity <= _TOP * max((x.peak or 0 for x in accounts), default=0):
            memory.axhline(capacity / _GIB, color="black", ls="--", label=label)
        else:  # far above: in its scale the others would lie on the floor
            memory.plot([], [], color="none", label=label)
        for speed in speeds:
            _finish(speed, "tokens/s, predicted: all overlaps, or nothing")
        _finish(memory, "peak GiB of a device")
        with stage(f"{path}: the plot cannot be written", _WAY_OUT):
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=110, metadata={"Software": _SOFTWARE})


def _draw_memory(axes: Any, name: str, points: list[Point], colour: str) -> None:
    known = [(x, x.account.peak) for x in points if x.account and x.account.peak]
    pairs, peaks = [x.pairs for x, _ in known], [peak / _GIB for _, peak in known]
    axes.plot(pairs, peaks, color=colour, label=name)
    for (point, _), peak in zip(known, peaks, strict=True):
        face = colour if point.fits else "none"
        axes.plot(point.pairs, peak, "o", mfc=face, mec=colour)


def _draw_speed(axes: Any, name: str, points: list[Point], colour: str) -> None:
    for point in points:
        account = point.account
        times = account.times if account else None
        if account is None or times is None:
            continue
        slow, fast = account.tokens / times.most_s, account.tokens / times.least_s
        face = colour if point.fits else "none"
        axes.plot([point.pairs] * 2, [slow, fast], color=colour, lw=1)
        axes.plot(point.pairs, slow, "v", mfc=face, mec=colour)
        axes.plot(point.pairs, fast, "^", mfc=face, mec=colour, label=name)
        name = "_"  # one entry of the legend a mesh


def _finish(axes: Any, label: str) -> None:
    axes.set(xlabel="pairs of a step", ylabel=label)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(title="data x fsdp x tensor", fontsize=8)
