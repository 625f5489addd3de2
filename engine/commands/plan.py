"""`dpo plan`: what a run's step takes of devices that need not be here."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from engine.commands.inputs import RunData, prepare_data, read_data
from engine.commands.plan_options import PlanOptions
from engine.config.run import RunConfig
from engine.data.shapes import Sizes
from engine.errors import InputError, stage
from engine.planning.account import Account, as_json
from engine.planning.changes import Fitting, smallest_changes
from engine.planning.devices import devices_of
from engine.planning.models import model_configs, with_local_models
from engine.planning.planner import Planner, SizesOf
from engine.planning.plots import check_plot, plot_sweep
from engine.planning.report import report, table, verdict
from engine.planning.sweep import Point, show, sweep
from engine.planning.sweep import as_json as sweep_as_json
from engine.training.compilation import keep_programs
from engine.training.plans import plan_stream, plan_training

logger = logging.getLogger(__name__)


class _Shapes(NamedTuple):
    """Where the shapes of batches come from."""

    words: str
    sizes_of: SizesOf
    has_values: bool = False


def main(run: RunConfig, options: PlanOptions) -> int:
    """Print the account of a run's step; 1 where it does not fit, else 0.

    Raises:
        InputError: whatever training would refuse; a target that cannot be.
    """
    target = options.target
    plot = Path(options.plot or Path(run.trainer.save_directory) / "plan.png")
    if options.sweep:
        check_plot(plot)
    if target.chip.platform == "cpu":
        keep_programs()
    else:  # what is compiled for absent devices cannot be read back
        jax.config.update("jax_enable_compilation_cache", False)
    devices = devices_of(target)
    run = with_local_models(run)
    shapes = _shapes(run, options, run.sharding.mesh(devices))
    planner = Planner(
        target=target,
        devices=devices,
        sizes_of=shapes.sizes_of,
        has_values=shapes.has_values,
    )
    account = planner.account(run)
    print(report(account, shapes.words), flush=True)
    changes = []
    if not account.fits and options.search:
        changes = smallest_changes(run, planner)
        print(_changes(changes), flush=True)
    points = []
    if options.sweep:
        points = list(sweep(run, planner))
        print(f"\n{show(points)}", flush=True)
        title = f"{run.model.name_or_path} on {target.text}"
        plot_sweep(plot, title, points, target.capacity)
        print(f"\ndrawn in {plot}")
    if options.json is not None:
        _write(Path(options.json), account, shapes.words, changes, points)
    return 0 if account.fits else 1


def _shapes(run: RunConfig, options: PlanOptions, mesh: Mesh) -> _Shapes:
    """Those of the run's own data, where that can be read."""
    most = f"the most that max_length={run.trainer.max_length} allows"
    if not options.data:
        return _Shapes(f"{most} (--no-data)", lambda run, mesh: None)
    try:
        data = read_data(run)
    except InputError as error:
        words = f"{most}, as the data is not there: {error}"
        return _Shapes(words, lambda run, mesh: None)
    return _shapes_of_data(run, data, mesh)


def _shapes_of_data(run: RunConfig, data: RunData, mesh: Mesh) -> _Shapes:
    model, reference = model_configs(run)
    prepared = prepare_data(run, data, mesh=mesh, model=model, reference=reference)

    def sizes_of(run: RunConfig, mesh: Mesh) -> Sizes:
        if data.stream is not None:
            return plan_stream(run.trainer, data.stream, mesh)
        return plan_training(run.trainer, data.pairs[""], mesh)

    number = len(prepared.plan.shapes)
    words = "the largest batch of the run's own data"
    if number > 1:
        words += f", one of {number} shapes, each of which is a program"
    return _Shapes(words, sizes_of, prepared.has_values)


def _changes(changes: list[Fitting]) -> str:
    if not changes:
        return (
            "\nnothing makes it fit here: not accumulation, remat, packing, shared "
            "prompts, the mesh, precomputed log-probabilities, all of them, or an "
            "adapter; take more or larger devices, or shorter rows (trainer.max_length)"
        )
    lines = [(" ".join(x.overrides), verdict(x.account)) for x in changes]
    found = table(("any one of these makes it fit:", ""), lines)
    note = ""
    if any(x.account.step.model.adapter for x in changes):
        note = "\n(an adapter is another model than full training makes)"
    return f"\n{found}{note}"


def _write(
    path: Path,
    account: Account,
    shapes: str,
    changes: list[Fitting],
    points: list[Point],
) -> None:
    content: dict[str, Any] = {
        "account": as_json(account) | {"shapes": shapes},
        "changes": [
            {"overrides": list(x.overrides), "account": as_json(x.account)}
            for x in changes
        ],
        "sweep": sweep_as_json(points),
    }
    with stage(f"--json {path} cannot be written", "give another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
