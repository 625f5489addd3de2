"""The report's lines, where they hold more than a number."""

import io

import numpy as np
import pytest
from rich.console import Console

from engine.inspection.report import print_histogram, round_width
from engine.inspection.screen import Screen
from engine.inspection.summary import Parts


def histogram(longest, width=40) -> list[str]:
    out = io.StringIO()
    found = Parts(*([np.array(longest)] * 4))
    print_histogram(Screen(Console(file=out, width=width), False), found)
    return out.getvalue().splitlines()[2:]


def test_a_histogram():
    assert histogram([10, 11, 14, 19, 20, 20, 20, 20]) == [
        "10-10  1  ########",
        "11-11  1  ########",
        "12-12  0",
        "13-13  0",
        "14-14  1  ########",
        "15-15  0",
        "16-16  0",
        "17-17  0",
        "18-18  0",
        "19-19  1  ########",
        "20-20  4  ##############################",
    ]
    assert histogram([7]) == ["7-7  1  ################################"]


def test_a_few_that_are_much_longer_share_a_line():
    lines = histogram([*range(0, 1200), 9000, 8000])
    assert lines[0].split()[:2] == ["0-99", "100"]
    assert [line.split() for line in lines[-2:]] == [
        ["1,100-1,199", "100", "#" * 22],
        ["1,200", "on", "2", "#"],
    ]
    assert max(map(len, lines)) <= 40


@pytest.mark.parametrize(
    "span, expected", [(0, 1), (11, 1), (12, 2), (100, 10), (1300, 200), (10**9, 10**8)]
)
def test_bins_have_a_round_width(span, expected):
    assert round_width(span, 12) == expected
