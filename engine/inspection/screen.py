"""Where a report goes: a terminal with colours, or plain text of 80 columns."""

import io
import os
import sys
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

LABEL = 12  # columns of a label
_PLAIN_WIDTH = 80
_NARROWEST, _WIDEST = 40, 120  # columns; longer lines are no easier to read


class Screen(NamedTuple):
    """A console, and what it can show."""

    console: Console
    shades: bool  # enough colours to tell neighbouring tokens apart

    @property
    def width(self) -> int:
        """Columns of a line."""
        return self.console.width

    @property
    def encoding(self) -> str:
        """In which text is written."""
        return self.console.encoding

    def line(self, text: str | Text = "", style: str = "") -> None:
        """One line as it is, neither wrapped nor cut."""
        text = Text(text, style=style) if isinstance(text, str) else text
        self.console.print(text, soft_wrap=True)

    def heading(self, title: str) -> None:
        """A line across the screen that begins a part; a long title is folded."""
        self.line()
        for line in Text(f"--- {title}").wrap(self.console, self.width - 2):
            line.rstrip()
            self.line(f"{line.plain} ".ljust(self.width, "-"), "bold")

    def item(self, label: str, text: str | Text, style: str = "") -> None:
        """A label, and text beside it, which is wrapped at spaces."""
        text = Text(text) if isinstance(text, str) else text
        for i, line in enumerate(text.wrap(self.console, self.width - LABEL)):
            line.rstrip()
            shown = Text().append((label if i == 0 else "").ljust(LABEL), style)
            self.line(shown.append_text(line))


def screen() -> Screen:
    """Standard output; where a pipe reads it, or NO_COLOR is set, no escape codes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files may have what an ASCII terminal cannot show.
        sys.stdout.reconfigure(errors="backslashreplace")
    probe = Console()
    plain = not probe.is_terminal or probe.no_color or probe.is_dumb_terminal
    width = probe.width
    if not probe.is_terminal:
        # (Of a pipe rich gives the width of the terminal around it.)
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if columns.isdecimal() else _PLAIN_WIDTH
    console = Console(
        width=max(_NARROWEST, min(width, _WIDEST)),
        color_system=None if plain else "auto",
        emoji=False,
        markup=False,
        highlight=False,
    )
    return Screen(console, not plain and probe.color_system in ("256", "truecolor"))
