"""`dpo validate`: check a run file, and print what would be run."""

import math
from pathlib import Path

from engine.commands.inputs import prepare_run
from engine.config.run import RunConfig
from engine.data.batches import BatchPlan
from engine.data.doubts import warn
from engine.data.pair_streams import PairStream
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
    print(f"trained     {_trained(model)}")
    print(f"reference   {_reference(run)}")
    if prepared.reads_values:
        source = "the data's columns" if prepared.has_values else "scored once, kept"
        print(f"            its log-probabilities: {source}")
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    print(f"mesh        {axes} on {mesh.devices.flat[0].device_kind}")
    if isinstance(prepared.train, PairStream):
        print(f"train       {_describe_stream(prepared.train)}")
    else:
        print(f"train       {_describe(prepared.train)}")
    shapes = ", ".join(f"{s} ({t} scored a device)" for s, t in plan.shapes)
    size = run.trainer.total_batch_size
    print(f"batches     of {size} pairs, tokens padded to {shapes}")
    an_epoch = ""
    if isinstance(plan, BatchPlan):
        an_epoch = f", {plan.order.batches_per_epoch} an epoch"
    print(f"steps       {plan.steps}{an_epoch}")
    for pairs in prepared.evaluations.values():
        print(f"evaluation  {_describe(pairs)}")
    print(f"writes to   {Path(run.trainer.save_directory)}")
    print("valid")


def _count(config: DecoderConfig, trainable: bool) -> int:
    return sum(
        math.prod(parameter.shape) * (config.num_layers if parameter.stacked else 1)
        for parameter in config.parameters().values()
        if parameter.trainable is trainable
    )


def _size(config: DecoderConfig) -> str:
    return f"{_count(config, trainable=config.adapter is None):,} parameters"


def _trained(config: DecoderConfig) -> str:
    count, adapter = _count(config, trainable=True), config.adapter
    if adapter is None:
        return f"all {count:,}"
    share = count / _count(config, trainable=False)
    modules = ", ".join(adapter.modules)
    return (
        f"{count:,} ({share:.2%}): LoRA of rank {adapter.rank}, scale "
        f"{adapter.scale:.4g}, in {modules}"
    )


def _reference(run: RunConfig) -> str:
    given, lora = run.reference_model, run.lora
    if run.trainer.without_reference:
        return "none"
    if given is not None:
        parts = given.name_or_path or run.model.name_or_path, given.adapter
        return " with the adapter ".join(part for part in parts if part)
    if lora is None:
        return "a frozen copy of the model"
    if lora.adapter is None:
        return "the model without its adapter"
    return f"the model with a frozen copy of {lora.adapter}"


def _describe(pairs: PairTokens) -> str:
    longest = int(pairs.lengths.max())
    dropped = f", {pairs.dropped} dropped" if pairs.dropped else ""
    if pairs.weightless:
        dropped += f", {pairs.weightless} of weight 0 left out"
    low, high = pairs.weights.min(), pairs.weights.max()
    weights = "" if low == high == 1 else f", weights from {low:g} to {high:g}"
    return f"{len(pairs)} pairs{dropped}, the longest of {longest} tokens{weights}"


def _describe_stream(stream: PairStream) -> str:
    """The first rows, which alone are looked at; logs what they are doubted for."""
    chunk, pairs = stream.head
    number = len(chunk.rows)
    for doubt in pairs.doubts:
        warn(doubt, f"the first {number} rows", chunk, chunk.ignored(doubt.first))
    some = _describe(pairs) if len(pairs) else f"no pairs, {pairs.dropped} dropped"
    return f"streamed; only the first {number} rows are checked here: {some}"
