"""Which step is planned where the target's memory decides."""

from dataclasses import replace

import pytest

from engine.planning.account import Account
from engine.planning.changes import remats
from engine.planning.planner import Planner
from engine.planning.targets import parse_target
from tests.engine.planning.runs import tiny_run


class Verdict(Account):
    """Of a step, no more than whether it fits."""

    def __init__(self, fits):
        vars(self).update(refusal=None if fits else "no room", peak=0, target=TPU)


class Recorder(Planner):
    """Compiles nothing: some ways to recompute fit, and others do not."""

    fitting: set[str]
    tried: list[str]

    def _account(self, run, words):
        self.tried.append(run.model.remat)
        return Verdict(run.model.remat in self.fitting)


TPU = parse_target("v5e:2x2")


@pytest.mark.parametrize(
    ("target", "fitting", "tried"),
    [
        ("v5e:2x2", {"none", "dots", "full"}, ["none"]),
        ("v5e:2x2", {"dots", "full"}, ["none", "dots"]),
        ("v5e:2x2", {"full"}, ["none", "dots", "full"]),
        ("v5e:2x2", set(), ["none", "dots", "full", "offload"]),
        ("cpu:1", {"none", "dots", "full"}, ["full"]),
    ],
)
def test_auto_is_the_first_that_fits(tmp_path, target, fitting, tried):
    planner = Recorder(
        target=parse_target(target), devices=[], sizes_of=lambda run, mesh: None
    )
    vars(planner).update(fitting=fitting, tried=[])
    run = tiny_run(tmp_path, remat="auto")
    assert planner.account(run).fits == (tried[-1] in fitting)
    assert planner.tried == tried
    assert list(remats(run)) == []  # all have been tried
    planner.account(replace(run, model=replace(run.model, remat="dots")))
    assert planner.tried == [*tried, "dots"]
