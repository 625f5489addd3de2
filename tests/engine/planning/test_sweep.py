import pytest

from engine.errors import InputError
from engine.planning import plots
from engine.planning.plots import plot_sweep
from engine.planning.sweep import mesh_shapes, show, sweep
from tests.engine.planning.fakes import CAPACITY, FakePlanner
from tests.engine.planning.runs import tiny_run


def points_of(tmp_path, peak, **options):
    planner = FakePlanner(peak, **options)
    return list(sweep(tiny_run(tmp_path), planner)), planner


def test_meshes_use_all_devices():
    assert list(mesh_shapes(8)) == [
        *((1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8)),
        *((2, 4, 1), (4, 2, 1), (8, 1, 1)),
    ]
    assert list(mesh_shapes(1)) == [(1, 1, 1)]
    assert list(mesh_shapes(6)) == [(1, 6, 1), (1, 3, 2), (2, 3, 1)]


def test_batches_grow_until_they_do_not_fit(tmp_path):
    points, planner = points_of(tmp_path, lambda run, pairs: 30 * pairs)
    of_one = [(x.pairs, x.fits) for x in points if x.mesh == (1, 4, 1)]
    assert of_one == [(4, True), (8, True), (16, False)]
    # With tensor=4 there is one shard.
    of_four = [(x.pairs, x.fits) for x in points if x.mesh == (1, 1, 4)]
    assert of_four == [(1, True), (2, True), (4, False)]
    assert len(planner.compiled) == len(points) == 15
    table = show(points).splitlines()
    assert len(table) == 16 and table[1].split() == ["1x4x1", "4", "0.00", "yes"]


def test_they_end_somewhere_and_a_mesh_that_holds_too_much_is_not_compiled(tmp_path):
    points, planner = points_of(
        tmp_path,
        lambda run, pairs: 1,
        held=lambda run: 200 if run.sharding.data > 1 else 0,
    )
    assert [x.pairs for x in points if x.mesh == (1, 4, 1)] == [4, 8, 16, 32, 64]
    [copied] = [x for x in points if x.mesh == (4, 1, 1)]
    assert not copied.fits and copied.account is None
    assert not [x for x in planner.compiled if "4x1x1" in x]
    assert "4x1x1" in show(points)


def test_the_plot_replaces_only_an_earlier_one(tmp_path):
    points, _ = points_of(tmp_path, lambda run, pairs: 30 * pairs)
    path = tmp_path / "new" / "plan.png"
    for _ in range(2):
        plot_sweep(path, "a $title", points, CAPACITY)
        assert path.read_bytes().startswith(b"\x89PNG")
    path.write_bytes(b"something else")
    with pytest.raises(InputError, match="is not a plot of `dpo plan`; give another"):
        plot_sweep(path, "x", points, CAPACITY)


def test_without_matplotlib_nothing_is_compiled_for_a_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        plots.check_plot(tmp_path / "plan.png")
