"""Histograms as PNG files, which replace none of anybody else's."""

import struct

import numpy as np
import pytest

from engine.errors import InputError
from engine.inspection.plots import plot_lengths
from engine.inspection.summary import Parts

RNG = np.random.default_rng(0)
PARTS = Parts(*(RNG.integers(1, 900, (4, 50))))


def draw(directory, parts=PARTS, max_length: int | None = 512):
    return plot_lengths(directory, "lengths.png", "t_$i$tle", parts, max_length)


def test_a_plot_and_another_in_its_place(tmp_path):
    path = draw(tmp_path / "new" / "folder")
    data = path.read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG") and (width, height) == (1210, 825)
    other = Parts(*(x // 2 + 1 for x in PARTS))
    assert draw(path.parent, other).read_bytes() != data
    assert [p.name for p in path.parent.iterdir()] == ["lengths.png"]


def test_lengths_that_are_all_the_same(tmp_path):
    one = Parts(*(np.array([1]) for _ in Parts._fields))
    assert draw(tmp_path, one, None).exists()


@pytest.mark.parametrize("content", [b"notes", b"\x89PNG\r\n\x1a\nanother's", b""])
def test_a_file_of_somebody_else_stays(tmp_path, content):
    (tmp_path / "lengths.png").write_bytes(content)
    with pytest.raises(InputError, match="is not a plot of `dpo inspect`"):
        draw(tmp_path)
    assert (tmp_path / "lengths.png").read_bytes() == content


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the plot cannot be written: .*--no-plots"):
        draw(tmp_path / "file")
    (tmp_path / "lengths.png").symlink_to("nowhere")
    with pytest.raises(InputError, match="is a link to nothing"):
        draw(tmp_path)
    (tmp_path / "folder" / "lengths.png").mkdir(parents=True)
    with pytest.raises(InputError, match="is not a plot of `dpo inspect`"):
        draw(tmp_path / "folder")
