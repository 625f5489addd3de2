"""`dpo train`: train on a run file's pairs, evaluate, and save the model."""

from engine.commands.inputs import prepare_run
from engine.config.run import RunConfig
from engine.models import load_model
from engine.objective.references import load_reference
from engine.training.trainer import Trainer


def main(run: RunConfig) -> None:
    """Train as a run file says; everything is checked before a weight is loaded."""
    prepared = prepare_run(run)
    model = load_model(
        run.model.name_or_path,
        mesh=prepared.mesh,
        dtype=run.model.dtype,
        param_dtype=run.model.param_dtype,
        remat=run.model.remat,
    )
    reference = None
    if run.reference_model is not None:
        reference = load_reference(
            run.reference_model.name_or_path, model, synced=run.trainer.sync_ref_model
        )
    # The trainer takes the arrays over: `model` is empty from the first step on.
    Trainer(prepared, model, reference).train()
