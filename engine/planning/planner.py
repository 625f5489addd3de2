"""Accounts of a run and of its variants on one target."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jax.sharding import Mesh

from engine.config.run import RunConfig
from engine.data.shapes import Sizes
from engine.models.remat import remats_of_auto
from engine.planning.account import Account, held_by, take_account
from engine.planning.models import model_configs
from engine.planning.report import verdict
from engine.planning.steps import Step, make_step
from engine.planning.targets import Target

logger = logging.getLogger(__name__)

# The batches of a variant of the run on its mesh; None: the largest by its options.
SizesOf = Callable[[RunConfig, Mesh], Sizes | None]


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Compiles a run's step, as it is and otherwise, for one target."""

    target: Target
    devices: list[Any]
    sizes_of: SizesOf
    has_values: bool = False  # the data brings the reference's log-probabilities

    def step(self, run: RunConfig) -> Step:
        """The step of a run, not compiled.

        Raises:
            InputError: whatever training would refuse.
        """
        mesh = run.sharding.mesh(self.devices)
        sizes = self.sizes_of(run, mesh)
        return make_step(
            run, *model_configs(run), mesh, sizes, has_values=self.has_values
        )

    def account(self, run: RunConfig, words: str = "") -> Account:
        """Compile it; `words`: what is said of it in the log.

        With `model.remat: auto` as training would have it: the first that fits.
        """
        if run.model.remat != "auto":
            return self._account(run, words)
        remats = remats_of_auto(self.target.chip.platform != "cpu")
        runs = [replace(run, model=replace(run.model, remat=x)) for x in remats]
        *keeping, last = runs
        for one in keeping:
            account = self._account(one, f"{words} remat={one.model.remat}".strip())
            if account.fits:
                return account
        return self._account(last, f"{words} remat={last.model.remat}".strip())

    def _account(self, run: RunConfig, words: str) -> Account:
        step = self.step(run)
        logger.info("compiling for %s %s...", self.target.text, words and f"{words} ")
        account = take_account(step, self.target)
        logger.info("compiled in %.1f s: %s", account.compile_s, verdict(account))
        return account

    def hopeless(self, step: Step) -> bool:
        """Whether what a step holds throughout is already more than there is."""
        return held_by(step).total > self.target.capacity
