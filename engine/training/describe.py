"""A run in a block of lines, before its first step: also what `dpo validate` prints."""

import math
import os
from collections.abc import Iterable, Mapping

import jax

from dpo_kernels.op.backends import supported_backends
from engine.config.dpo import DPOConfig
from engine.data.batches import BatchPlan
from engine.data.pair_streams import PairStream
from engine.data.pairs import PairTokens
from engine.data.stream_plans import Plan
from engine.models import DecoderConfig, attention
from engine.parallel.sharding import mesh_words
from engine.training.checks import op_problem
from engine.training.compilation import Compiled
from engine.training.prepare import Prepared

_INDENT = 12  # columns of the labels


def describe(run: Prepared, programs: Iterable[Compiled] = ()) -> dict[str, str]:
    """By label, what would be run and what would be written.

    Args:
        programs: what was compiled for it, whose memory is told.
    """
    about, arguments, plan = run.about, run.arguments, run.plan
    facts = {
        "model": f"{about.model}: {run.model.model_type}, {_size(run.model)}",
        "trained": _trained(run.model),
        "reference": _reference(run),
        "mesh": _mesh(run),
        "precision": f"computes in {about.dtype}, parameters {about.param_dtype}",
        "scoring": _scoring(run),
        "attention": attention.describe(
            arguments.attention,
            attention.Case.of(run.mesh, arguments.arrangement, about.dtype, run.model),
        ),
        "train": _stream(run.train)
        if isinstance(run.train, PairStream)
        else _pairs(run.train),
        "batches": _batches(arguments, plan),
        "steps": f"{plan.steps:,}{_an_epoch(plan)}",
    }
    for prefix, pairs in run.evaluations.items():
        name = prefix.rstrip("_").removeprefix("eval").lstrip("_")
        facts[f"evaluation {name}".rstrip()] = f"{_pairs(pairs)}; {_when(arguments)}"
    if run.best_model is not None:
        saved = "; the model that is saved" * arguments.load_best_model_at_end
        facts["best"] = f"{run.best_model.rule()}{saved}"
    if arguments.generation_num_prompts and run.evaluations:
        facts["answers"] = _answers(run)
    if memory := _memory(programs, run.mesh.devices.flat[0].platform):
        facts["memory"] = memory
    facts["writes to"] = _written(arguments)
    return facts


def lines(facts: Mapping[str, str]) -> str:
    """The block."""
    return "\n".join(f"{label:<{_INDENT - 1}} {text}" for label, text in facts.items())


def count_parameters(config: DecoderConfig, trainable: bool) -> int:
    """Numbers in the parameters that are trained, or in the others."""
    return sum(
        math.prod(parameter.shape) * (config.num_layers if parameter.stacked else 1)
        for parameter in config.parameters().values()
        if parameter.trainable is trainable
    )


def _size(config: DecoderConfig) -> str:
    return f"{count_parameters(config, config.adapter is None):,} parameters"


def _trained(config: DecoderConfig) -> str:
    count, adapter = count_parameters(config, True), config.adapter
    if adapter is None:
        return f"all {count:,}"
    share = count / count_parameters(config, False)
    modules = ", ".join(adapter.modules)
    return (
        f"{count:,} ({share:.2%}): LoRA of rank {adapter.rank}, scale "
        f"{adapter.scale:.4g}, in {modules}"
    )


def _reference(run: Prepared) -> str:
    words = run.about.reference
    if run.reads_values:
        source = "the data's columns" if run.has_values else "scored once, kept"
        return f"{words}; its log-probabilities: {source}"
    if run.arguments.sync_ref_model:
        words += f"; synced every {run.arguments.ref_model_sync_steps} steps"
    if run.arguments.offload_ref_model:
        words += "; in the host's memory"
    return words


def _mesh(run: Prepared) -> str:
    devices = run.mesh.devices
    axes = mesh_words(run.mesh.shape)
    kind = devices.flat[0].device_kind
    count = f"{devices.size} device{'s' * (devices.size != 1)}"
    processes = jax.process_count()
    several = f", {processes} processes" if processes > 1 else ""
    return f"{axes} on {kind}: {count}{several}"


def _scoring(run: Prepared) -> str:
    """Which kernels make the log-probabilities, of all shapes."""
    found: dict[str, None] = {}
    for plan in (run.plan, *run.eval_plans.values()):
        for _, capacity in plan.shapes:
            problem = op_problem(
                run.arguments, run.model, run.about.dtype, capacity, run.mesh
            )
            named = run.arguments.implementation
            name = supported_backends(problem)[0] if named == "auto" else named
            found[name] = None
    mib = run.arguments.workspace_bytes / 2**20
    return f"{', '.join(found)}, in a workspace of {mib:,.0f} MiB"


def _pairs(pairs: PairTokens) -> str:
    longest, tokens = int(pairs.lengths.max()), len(pairs.tokens)
    share = pairs.scored.sum() / tokens
    text = f"{len(pairs):,} pairs"
    if pairs.drops:
        dropped = sum(drop.num_pairs for drop in pairs.drops)
        why = ", ".join(f"{drop.num_pairs:,} {drop.reason}" for drop in pairs.drops)
        text += f", {dropped:,} dropped ({why})"
    text += (
        f", {tokens:,} tokens, {share:.0%} of them scored, the longest of {longest:,}"
    )
    low, high = pairs.weights.min(), pairs.weights.max()
    if not low == high == 1:
        text += f", weights from {low:g} to {high:g}"
    return text


def _stream(stream: PairStream) -> str:
    """The first rows, which alone are looked at."""
    chunk, pairs = stream.head
    number = len(chunk.rows)
    some = _pairs(pairs) if len(pairs) else f"no pairs, {pairs.dropped} dropped"
    return f"streamed; only the first {number} rows are checked here: {some}"


def _an_epoch(plan: Plan) -> str:
    if not isinstance(plan, BatchPlan):  # how long an epoch is nobody knows
        return ""
    return f", {plan.order.batches_per_epoch:,} an epoch"


def _batches(arguments: DPOConfig, plan: Plan) -> str:
    shapes = ", ".join(f"{s} ({t} scored a device)" for s, t in plan.shapes)
    parts = arguments.gradient_accumulation_steps
    several = f" in {parts} microbatches" if parts > 1 else ""
    size = arguments.total_batch_size
    rows = {
        (False, False): "a row for each sequence",
        (False, True): "a row for each pair, its prompt once",
        (True, False): "packed into one row a device",
        (True, True): "packed into one row a device, each prompt once",
    }[arguments.packing, arguments.share_prompt]
    return f"of {size} pairs{several}, {rows}, padded to {shapes}"


def _when(arguments: DPOConfig) -> str:
    every = arguments.eval_steps
    first = "before the first step, " if arguments.eval_on_start else ""
    often = "" if every is None else f"every {every} steps and "
    return f"{first}{often}at the end"


def _answers(run: Prepared) -> str:
    arguments = run.arguments
    count, most = arguments.generation_num_prompts, arguments.generation_max_new_tokens
    of = " of each set" if len(run.evaluations) > 1 else ""
    heat = arguments.generation_temperature
    how = f"drawn at temperature {heat:g}" if heat else "the likeliest token each time"
    who = "policy and reference"
    if arguments.without_reference or run.has_values:
        who = "the policy (there is no reference model)"
    return f"of {who} to {count} held-out prompts{of}, at most {most} tokens, {how}"


def _memory(programs: Iterable[Compiled], platform: str) -> str:
    """The most that a program needs of a device, as its compiler says."""
    found = [program.taken(platform) for program in programs]
    known = [taken for taken in found if taken is not None]
    if not known:
        return ""
    most = max(known, key=lambda taken: taken.peak)
    return (
        f"{_bytes(most.peak)} a device: {_bytes(most.held)} held, "
        f"{_bytes(most.temporary)} during a step"
    )


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _written(arguments: DPOConfig) -> str:
    what = ["metrics.jsonl", "run.json"]
    saves = arguments.save_steps or arguments.save_interval_minutes
    if saves or arguments.comparing:
        what.append("checkpoints/")
    if arguments.generation_num_prompts:
        what.append("generations.jsonl")
    if arguments.use_tensorboard:
        what.append("tensorboard/")
    if arguments.use_wandb:
        what.append("wandb/")
    what.append("the model at the end")
    return f"{os.fspath(arguments.save_directory)}: {', '.join(what)}"
