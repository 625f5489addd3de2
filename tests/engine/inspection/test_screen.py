"""What is written where: colours in a terminal, plain text of 80 columns elsewhere."""

import io
import sys

import pytest

from engine.inspection.screen import screen


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def written(monkeypatch, kind=io.TextIOWrapper, encoding="utf-8") -> tuple[str, bool]:
    written = io.BytesIO()
    stream = kind(written, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    out = screen()
    out.heading("title")
    out.item("label", "text é", "bold red")
    stream.flush()
    return written.getvalue().decode(encoding), out.shades


def test_a_terminal(monkeypatch):
    text, shades = written(monkeypatch, Terminal)
    assert "\x1b[1;31mlabel" in text and shades


@pytest.mark.parametrize(
    "kind, variable, value",
    [
        (io.TextIOWrapper, "TERM", "xterm-256color"),
        (Terminal, "NO_COLOR", "1"),
        (Terminal, "TERM", "dumb"),
    ],
    ids=["a pipe", "NO_COLOR", "a dumb terminal"],
)
def test_no_escape_codes(monkeypatch, kind, variable, value):
    monkeypatch.setenv(variable, value)
    text, shades = written(monkeypatch, kind)
    assert "\x1b" not in text and "label       text é\n" in text and not shades


def test_few_colours(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text, shades = written(monkeypatch, Terminal)
    assert "\x1b[1;31mlabel" in text and not shades


@pytest.mark.parametrize(
    "columns, width", [(None, 80), ("100", 100), ("9", 40), ("9999", 120), ("x", 80)]
)
def test_the_width_of_a_pipe(monkeypatch, columns, width):
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    text, _ = written(monkeypatch)
    assert f"--- title {'-' * (width - 10)}\n" in text


def test_what_the_encoding_does_not_have(monkeypatch):
    text, _ = written(monkeypatch, encoding="ascii")
    assert "text \\xe9" in text
