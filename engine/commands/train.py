"""`dpo train`: train on a run file's pairs, evaluate, and save the model."""

from engine.commands.inputs import prepare_run
from engine.config.run import RunConfig
from engine.models import Decoder, load_model
from engine.training.prepare import Prepared
from engine.training.trainer import Trainer


def main(run: RunConfig) -> None:
    """Train as a run file says; everything is checked before a weight is loaded."""
    prepared = prepare_run(run)
    # Nothing here keeps the models: the trainer uses their arrays up.
    Trainer(
        prepared, _load_policy(run, prepared), _load_reference(run, prepared)
    ).train()


def _load_policy(run: RunConfig, prepared: Prepared) -> Decoder:
    return load_model(
        run.model.name_or_path,
        mesh=prepared.mesh,
        dtype=run.model.dtype,
        param_dtype=run.model.param_dtype,
        remat=run.model.remat,
    )


def _load_reference(run: RunConfig, prepared: Prepared) -> Decoder | None:
    if run.reference_model is None:
        return None
    synced = run.trainer.sync_ref_model
    return load_model(
        run.reference_model.name_or_path,
        mesh=prepared.mesh,
        dtype=run.model.dtype,
        # One that never changes needs no more digits than are computed with.
        param_dtype=run.model.param_dtype if synced else run.model.dtype,
        remat=run.model.remat,
    )
