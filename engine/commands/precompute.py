"""`dpo precompute`: the reference's log-probabilities of a run file's pairs, alone."""

import dataclasses

from engine.commands.inputs import prepare_run
from engine.commands.train import load_models
from engine.config.run import RunConfig
from engine.errors import InputError
from engine.parallel import processes
from engine.training.precompute import with_reference_values


def main(run: RunConfig) -> None:
    """Score every pair of every data set under the reference, and keep that on disk.

    Raises:
        InputError: whatever training would refuse; or there is nothing to score.
    """
    trainer = dataclasses.replace(run.trainer, precompute_ref_log_probs=True)
    run = dataclasses.replace(run, trainer=trainer)
    prepared = prepare_run(run)
    if prepared.has_values:
        raise InputError(
            "nothing to precompute: the data's columns ref_chosen_logps and "
            "ref_rejected_logps have the reference's log-probabilities"
        )
    model, reference = load_models(run, prepared.model, prepared.mesh)
    done = with_reference_values(prepared, model, reference)
    if not processes.is_first():
        return
    for name, (pairs, _) in done.sets.items():
        assert pairs.ref_logps is not None
        chosen, rejected = pairs.ref_logps.mean(axis=0)
        print(
            f"{f'{name}dataset' if name else 'train_dataset'}: {len(pairs)} pairs, "
            f"chosen {chosen:.3f}, rejected {rejected:.3f} nats in the mean"
        )
    print("train with trainer.precompute_ref_log_probs=true to use them")
