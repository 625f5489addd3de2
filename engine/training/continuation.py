"""Whether a run may go on where its save directory has one: known before any weight.

What only the weights tell, `Checkpointing.restore` compares when they are there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engine.data.pair_streams import PairStream
from engine.errors import InputError
from engine.paths import as_path
from engine.training.best import Best, BestModel
from engine.training.checkpoints import Store
from engine.training.identity import check_same_run, checksum_of_pairs, flat
from engine.training.prepare import Prepared

DATA = "data"  # what is trained on, among the values of a configuration


class Continuation(NamedTuple):
    """What a run goes on from, and how it differs from what that was."""

    checkpoint: Path
    changes: list[str]  # that do no harm, in words


def configuration(run: Prepared, config: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted keys, all that a run is but for its weights.

    config: what of it is not in `run.arguments`.
    """
    # Of a stream the first rows must do: the rest has not been read.
    pairs = run.train.head[1] if isinstance(run.train, PairStream) else run.train
    data = {DATA: checksum_of_pairs(pairs)}
    return flat(run.arguments, "trainer") | dict(config) | data


def check_continuation(run: Prepared, config: Mapping[str, Any]) -> Continuation | None:
    """What a run would go on from, or None where it begins.

    The contents of its arrays are not read: that takes as long as loading them.

    Raises:
        InputError: it is of a run that differs, naming the first key that does harm; or
            this run is over; or there are checkpoints and none is whole.
    """
    directory = as_path(run.arguments.save_directory)
    if not run.arguments.resume:
        check_empty(directory)
        return None
    store = Store(directory, None)
    step, _ = store.newest(contents=False)
    if step is None:
        return None
    facts = store.facts(step)
    then = facts["identity"]["config"]
    # As JSON has it: what is compared has been there.
    now = json.loads(json.dumps(configuration(run, config)))
    if run.reads_values and not run.has_values:
        # The reference's log-probabilities belong to the data, and are to come.
        then, now = (
            {k: x for k, x in some.items() if k != DATA} for some in (then, now)
        )
    where = of_another_run(store, step)
    changes = check_same_run(then, now, run.arguments, where)
    finished = store.finished() or 0
    check_not_over(store, step, run.plan.steps, finished)
    check_not_stopped(store, step, run.best_model, facts, finished)
    return Continuation(store.path(step), changes)


def of_another_run(store: Store, step: int) -> str:
    """What a message about a difference begins with."""
    return f"{store.path(step)} is of another run"


def check_empty(directory: Path) -> None:
    """Refuse to begin anew where something is.

    Raises:
        InputError: naming it.
    """
    there = directory.is_dir() and sorted(directory.iterdir())
    if there:
        raise InputError(
            f"save_directory={str(directory)!r} has {there[0].name!r}, and "
            "resume=False begins anew in an empty directory only; give another "
            "save_directory, or set resume to true"
        )


def check_not_over(store: Store, step: int, total: int, finished: int) -> None:
    """Refuse a run that has fewer steps than are done, or whose steps are all done.

    Args:
        finished: after how many steps its model was saved; 0: it was not.
    Raises:
        InputError: saying what to do.
    """
    if step > total:
        raise InputError(
            f"{store.path(step)} is beyond the {total} steps of this run; "
            "give more steps, or another save_directory"
        )
    if step == total and finished >= total:
        raise InputError(
            f"all {total} steps of the run in {store.directory.parent} are done, and "
            "its model is there; give another save_directory to train anew, or more "
            "steps to go on (num_train_epochs, or max_training_steps; with a "
            "schedule that does not end with the run)"
        )


def check_not_stopped(
    store: Store,
    step: int,
    best_model: BestModel | None,
    facts: Mapping[str, Any],
    finished: int,
) -> None:
    """Refuse a run that has stopped early, and whose model is saved.

    Args:
        facts: of the checkpoint of this step.
        finished: after how many steps its model was saved; 0: it was not.
    Raises:
        InputError: saying what to do.
    """
    if best_model is None or finished < step:
        return
    best = Best(**facts["progress"].get("best", {}))
    if not best_model.is_over(best):
        return
    raise InputError(
        f"the run in {store.directory.parent} has stopped after step {step} "
        f"({best_model.why_over(best)}), and its model is there; give another "
        "save_directory to train anew, or a larger early_stopping_patience to go on"
    )
