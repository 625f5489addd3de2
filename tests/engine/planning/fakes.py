"""A planner that compiles nothing: what a run takes is a formula of its options."""

from types import SimpleNamespace
from typing import Any

from engine.errors import InputError
from engine.planning.account import Account
from engine.planning.planner import Planner
from engine.planning.steps import Step
from engine.planning.targets import Target

CAPACITY = 100


class FakeTarget(Target):
    @property
    def capacity(self):
        return CAPACITY


class FakeStep(Step):
    of: Any
    share: float  # of the positions that there are in rows of one sequence

    def __init__(self, run, grid, share):
        planned = SimpleNamespace(plan=SimpleNamespace(grid=grid))
        vars(self).update(run=planned, of=run, share=share)

    @property
    def positions(self):
        return int(1000 * self.share)


class FakeAccount(Account):
    def __init__(self, target, step, peak):
        vars(self).update(target=target, step=step, peak=peak, traffic=None)


class FakePlanner(Planner):
    """`peak`: of a run and its pairs at once; `held`: of a run, throughout; `share`: of
    the positions of a batch that there are with these options.

    Runs whose pairs do not divide are refused, as by training.
    """

    compiled: list[str]  # the words of each
    peak_of: Any
    held_of: Any
    share_of: Any

    def __init__(self, peak, devices=4, held=lambda run: 0, share=lambda trainer: 1.0):
        chip = SimpleNamespace(platform="cuda", flops_per_s=0.0)
        target = FakeTarget.__new__(FakeTarget)
        vars(target).update(text="x:4", chip=chip, count=devices, sizes=(devices,))
        vars(self).update(target=target, devices=[], compiled=[])
        vars(self).update(peak_of=peak, held_of=held, share_of=share)

    def step(self, run):
        sharding, arguments, devices = run.sharding, run.trainer, self.target.count
        fsdp = sharding.fsdp
        if fsdp < 0:
            fsdp = devices // (sharding.data * sharding.tensor)
        shards = sharding.data * fsdp
        each = arguments.gradient_accumulation_steps * shards
        if arguments.total_batch_size % each:
            raise InputError("does not divide")
        pairs = arguments.total_batch_size // each
        grid = (arguments.gradient_accumulation_steps, shards, pairs)
        return FakeStep(run, grid, self.share_of(arguments))

    def hopeless(self, step):
        assert isinstance(step, FakeStep)
        return self.held_of(step.of) > CAPACITY

    def account(self, run, words=""):
        self.compiled.append(words)
        step = self.step(run)
        peak = int(self.peak_of(run, step.run.plan.grid[2]))
        return FakeAccount(self.target, step, peak)
