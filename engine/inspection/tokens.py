"""Rows of a data set as their tokens, told apart by kind: colours, labels, marks."""

from collections.abc import Iterator
from typing import NamedTuple

from rich.cells import cell_len
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from engine.inspection.pieces import Piece, Pieces
from engine.inspection.runs import Kind, Run, ShownPair
from engine.inspection.screen import Screen

_INDENT = 10  # columns of the label of a run
# Two backgrounds of each kind, which neighbouring tokens take in turns; all are of the
# 256 colours that nearly every terminal has, and of a text colour of their own.
_SHADES = {
    Kind.PROMPT: ("black on color(153)", "black on color(189)"),
    Kind.SCORED: ("black on color(157)", "black on color(194)"),
    Kind.UNSCORED: ("black on color(222)", "black on color(230)"),
    Kind.CUT: ("black on color(217)", "black on color(224)"),
}
_FEW_COLOURS = {
    Kind.PROMPT: "blue",
    Kind.SCORED: "green",
    Kind.UNSCORED: "yellow",
    Kind.CUT: "red",
}
_MEANINGS = {
    Kind.PROMPT: "read, not scored",
    Kind.SCORED: "of the completion: what is learned from",
    Kind.UNSCORED: "of the completion, read but not scored",
    Kind.CUT: "left out by the limits of length",
}
_HEAD, _TAIL = 6, 3  # lines of a long run that are shown
_LEAST_HIDDEN = 4  # lines; fewer are shown as well


class View(NamedTuple):
    """How tokens are shown."""

    ids: bool  # each with its id
    full: bool  # every line of long runs


class TokenPrinter:
    """Prints rows as their tokens."""

    def __init__(self, screen: Screen, tokenizer: PreTrainedTokenizerBase, view: View):
        self._screen = screen
        self._pieces = Pieces(tokenizer, screen.encoding)
        self._view = view

    def legend(self) -> None:
        """What the colours, labels and marks mean."""
        for kind, meaning in _MEANINGS.items():
            line = Text("  ").append(kind.value, self._style(kind, 0))
            line.append(" " * (_INDENT - len(kind.value)))
            self._screen.line(line.append(meaning))
        between = "two shades, in turns" if self._screen.shades else "| between them"
        self._screen.line(
            f"  tokens: {between}; (2): two make one character; \\n: line break"
        )

    def pair(self, shown: ShownPair) -> None:
        """Its prompt, once where both sides have the same, then its answers."""
        title = f"row {shown.row}"
        title += " (dropped)" if shown.pair is None else f", pair {shown.pair}"
        if shown.weight != 1:
            title += f", weight {shown.weight:g}"
        self._screen.heading(title)
        self._screen.item("from", shown.where)
        if shown.reason is not None:
            self._screen.item("dropped", shown.reason, "bold red")
        if not shown.sides:
            return
        chosen, rejected = shown.sides
        shared = chosen.prompt == rejected.prompt
        if shared:
            self._block("prompt", chosen.prompt)
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            before = () if shared else side.prompt
            self._block(name, before + side.completion)

    def _block(self, name: str, runs: tuple[Run, ...]) -> None:
        title = Text(name, style="bold").append(f": {_counts(runs)}", "not bold")
        self._screen.line(title)
        self._runs(runs)

    def _runs(self, runs: tuple[Run, ...]) -> None:
        for run in runs:
            lines = list(self._lines(run))
            hidden = lines[_HEAD:-_TAIL]
            if self._view.full or len(hidden) < _LEAST_HIDDEN:
                hidden = []
            for i, line in enumerate(lines):
                if hidden and _HEAD <= i < len(lines) - _TAIL:
                    if i == _HEAD:
                        tokens = sum(line.tokens for line in hidden)
                        self._screen.line(
                            f"{'':{_INDENT}}  ... {len(hidden)} lines, {tokens} tokens "
                            "(--full shows them) ...",
                            "dim",
                        )
                    continue
                label = run.kind.value if i == 0 else ""
                shown = Text("  ").append(label, self._style(run.kind, 0))
                shown.append(" " * (_INDENT - len(label)))
                self._screen.line(shown.append_text(line.text))

    def _style(self, kind: Kind, shade: int) -> str:
        return _SHADES[kind][shade] if self._screen.shades else _FEW_COLOURS[kind]

    def _lines(self, run: Run) -> Iterator["_Line"]:
        """The run's tokens, in lines that fit; a token that ends a line, ends one."""
        line = _Line(Text())
        mark = "" if self._screen.shades else "|"
        room = self._screen.width - _INDENT - 2 - len(mark)
        for number, piece in enumerate(self._pieces(run.ids)):
            style = self._style(run.kind, number % 2)
            style += " bold" if piece.special else ""
            text, fresh = self._label(piece), True
            while text or fresh:
                width = room - line.text.cell_len - len(mark) * fresh
                part = _fitting(text, width)
                if part != text and line.text and cell_len(text) + len(mark) <= room:
                    part = ""  # on the next line it is whole
                if part or not text:
                    line.text.append(mark if fresh else "", "none")
                    line.text.append(part, style)
                    line.tokens += len(piece.ids) if fresh else 0
                    text, fresh = text[len(part) :], False
                if text:
                    yield line.closed(mark if fresh else "")
                    line = _Line(Text())
            if piece.ends_line:
                yield line.closed(mark)
                line = _Line(Text())
        if line.text:
            yield line.closed(mark)

    def _label(self, piece: Piece) -> str:
        if self._view.ids:
            return f"{'+'.join(map(str, piece.ids))}:{piece.text}"
        return piece.text + (f"({len(piece.ids)})" if len(piece.ids) > 1 else "")


class _Line:
    """Part of a run, and how many tokens begin in it."""

    def __init__(self, text: Text):
        self.text = text
        self.tokens = 0

    def closed(self, mark: str) -> "_Line":
        self.text.append(mark, "none")
        return self


def _fitting(text: str, width: int) -> str:
    """As much of the start of a text as so many columns hold."""
    if cell_len(text) <= width:
        return text
    used = 0
    for i, character in enumerate(text):
        used += cell_len(character)
        if used > width:
            return text[:i]
    return text


def _counts(runs: tuple[Run, ...]) -> str:
    """How many tokens there are, and of which kinds beside the prompt's."""
    total = sum(len(run.ids) for run in runs)
    found = {kind: 0 for kind in Kind}
    for run in runs:
        found[run.kind] += len(run.ids)
    parts = [
        f"{'all' if count == total else count} {kind.value}"
        for kind, count in found.items()
        if count and kind is not Kind.PROMPT
    ]
    return ", ".join((f"{total} token{'' if total == 1 else 's'}", *parts))
