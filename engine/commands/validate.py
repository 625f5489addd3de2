"""`dpo validate`: check a run file, and print what would be run."""

import math
from pathlib import Path

from engine.commands.inputs import prepare_run
from engine.config.run import RunConfig
from engine.data.pairs import PairTokens
from engine.models import DecoderConfig


def main(run: RunConfig) -> None:
    """Check a run file, its checkpoints and its data; load no weights.

    Raises:
        InputError: whatever training would refuse.
    """
    prepared = prepare_run(run)
    model, plan, mesh = prepared.model, prepared.plan, prepared.mesh
    print(f"model       {run.model.name_or_path}: {model.model_type}, {_size(model)}")
    if run.trainer.without_reference:
        print("reference   none")
    elif run.reference_model is not None:
        print(f"reference   {run.reference_model.name_or_path}")
    else:
        print("reference   a frozen copy of the model")
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    print(f"mesh        {axes} on {mesh.devices.flat[0].device_kind}")
    print(f"train       {_describe(prepared.train)}")
    shapes = ", ".join(f"{s} ({t} scored a device)" for s, t in plan.shapes)
    size = run.trainer.total_batch_size
    print(f"batches     of {size} pairs, tokens padded to {shapes}")
    print(f"steps       {plan.steps}, {plan.order.batches_per_epoch} an epoch")
    for pairs in prepared.evaluations.values():
        print(f"evaluation  {_describe(pairs)}")
    print(f"writes to   {Path(run.trainer.save_directory)}")
    print("valid")


def _size(config: DecoderConfig) -> str:
    count = sum(
        math.prod(parameter.shape) * (config.num_layers if parameter.stacked else 1)
        for parameter in config.parameters().values()
    )
    return f"{count:,} parameters"


def _describe(pairs: PairTokens) -> str:
    longest = int(pairs.lengths.max())
    dropped = f", {pairs.dropped} dropped" if pairs.dropped else ""
    if pairs.weightless:
        dropped += f", {pairs.weightless} of weight 0 left out"
    low, high = pairs.weights.min(), pairs.weights.max()
    weights = "" if low == high == 1 else f", weights from {low:g} to {high:g}"
    return f"{len(pairs)} pairs{dropped}, the longest of {longest} tokens{weights}"
