"""`dpo evaluate`: every metric of a model on pairs, with confidence intervals."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from engine.commands.evaluate_options import EvaluateOptions
from engine.commands.inputs import reference_of
from engine.commands.train import load_models
from engine.config.dpo import DPOConfig
from engine.config.lora import LoraConfig
from engine.config.run import ReferenceConfig, RunConfig
from engine.data.pairs import PairTokens
from engine.data.sources import load_mixture
from engine.errors import InputError, stage
from engine.models import check_checkpoint, resolve_directory
from engine.models.checkpoint import ADAPTER_CONFIG, CONFIG
from engine.models.tokenizer import load_tokenizer
from engine.objective.references import Cached
from engine.parallel import processes
from engine.paths import as_path
from engine.training.checks import check_models, check_op
from engine.training.compilation import keep_programs
from engine.training.evaluator import Evaluator
from engine.training.identity import checksum_of_pairs, flat
from engine.training.intervals import CONFIDENCE, Estimate
from engine.training.lora import with_lora
from engine.training.prepare import EVAL, plan_evaluation, prepare_pairs
from engine.training.reference import make_reference

OUTPUT_NAME = "evaluation.json"
_COLUMNS = 12
_UNSYNCED = DPOConfig()


def main(run: RunConfig, options: EvaluateOptions) -> None:
    """Score pairs under a model and the run's reference; print and write the numbers.

    Raises:
        InputError: no model there, nothing to score, or what training would refuse.
    """
    source = options.model or run.trainer.save_directory
    output = as_path(options.output or _default_output(run))
    _check_given(run, options, source)
    keep_programs()
    mesh = run.sharding.mesh()
    # The tokens are those that training made.
    mixtures = {EVAL: run.eval_mixture} | ({"": run.mixture} if options.train else {})
    with processes.first_goes_first():
        tokenizer = load_tokenizer(run.model.tokenizer or run.model.name_or_path)
        pairs = {
            prefix: prepare_pairs(run.trainer, load_mixture(mixture), tokenizer)
            for prefix, mixture in mixtures.items()
            if mixture is not None
        }
    facts = {name: checksum_of_pairs(x) for name, x in pairs.items()}
    processes.check_same(flat(run) | facts, "the processes differ")
    has_values = all(x.ref_logps is not None for x in pairs.values())
    run = trained(run, source, with_reference=not has_values)
    model = check_checkpoint(resolve_directory(run.model.name_or_path))
    reference = reference_of(run, model)
    model = with_lora(model, run.lora, run.model.name_or_path)
    plans = {
        prefix: plan_evaluation(run.trainer, x, mesh) for prefix, x in pairs.items()
    }
    sets = {
        f"{prefix}dataset" if prefix else "train_dataset": x
        for prefix, x in pairs.items()
    }
    check_models(run.trainer, mesh, model, reference, tokenizer, sets)
    given_dtype = run.reference_model and run.reference_model.dtype
    for dtype in dict.fromkeys((run.model.dtype, given_dtype or run.model.dtype)):
        for plan in plans.values():
            check_op(run.trainer, model, dtype, plan, mesh)
    decoder, given = load_models(run, model, mesh)
    # (Values and an option that makes them meaningless were refused.)
    scores = Cached() if has_values else make_reference(decoder, given, run.trainer)
    evaluator = Evaluator(run.trainer, decoder, scores, plans.values())
    words = _reference_words(run, has_values)
    estimated = {prefix: evaluator.estimate(plan) for prefix, plan in plans.items()}
    if not processes.is_first():
        return
    print(f"model      {source}\nreference  {words}")
    found = {}
    for prefix, estimates in estimated.items():
        name = prefix.rstrip("_") or "train"
        found[name] = {
            "pairs": len(pairs[prefix]),
            "dropped": pairs[prefix].dropped,
            "metrics": {key: _plain(x) for key, x in estimates.items()},
        }
        print(_table(name, pairs[prefix], estimates))
    record = {
        "model": source,
        "reference": words,
        "confidence": CONFIDENCE,
        "sets": found,
    }
    _write(output, record)


def _default_output(run: RunConfig) -> Path:
    return as_path(run.trainer.save_directory) / OUTPUT_NAME


def _check_given(run: RunConfig, options: EvaluateOptions, source: str) -> None:
    if run.eval_mixture is None and not options.train:
        raise InputError(
            "there is nothing to evaluate: the run file has no eval_mixture; give it "
            "one, or score the training data with --train"
        )
    folder = as_path(source)
    if options.model is None and not any(
        (folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG)
    ):
        raise InputError(
            f"save_directory={source!r} has no trained model; train first, or name a "
            "model with --model"
        )


def trained(run: RunConfig, source: str, *, with_reference: bool) -> RunConfig:
    """The run whose policy is in `source`, and whose reference is what it was.

    A reference that followed the policy is gone: it is the one that training began
    with.

    Args:
        with_reference: whether a reference is needed at all.
    """
    base, lora, given = run.model.name_or_path, run.lora, run.reference_model
    is_adapter = (as_path(source) / ADAPTER_CONFIG).is_file()
    if given is None:
        adapter = lora and lora.adapter
        given = ReferenceConfig(name_or_path=base, adapter=adapter)
    given = replace(given, name_or_path=given.name_or_path or base)
    if run.trainer.without_reference or not with_reference:
        given = None
    model = replace(run.model, name_or_path=base if is_adapter else source)
    trainer = replace(
        run.trainer,
        sync_ref_model=False,
        ref_model_sync_steps=_UNSYNCED.ref_model_sync_steps,
        ref_model_mixup_alpha=_UNSYNCED.ref_model_mixup_alpha,
        precompute_ref_log_probs=False,
        offload_ref_model=False,
        disable_dropout=True,
    )
    return replace(
        run,
        model=model,
        lora=LoraConfig(adapter=source) if is_adapter else None,
        reference_model=given,
        trainer=trainer,
    )


def _reference_words(run: RunConfig, has_values: bool) -> str:
    given = run.reference_model
    if run.trainer.without_reference:
        return f"none ({run.trainer.without_reference})"
    if has_values or given is None:
        return "the log-probabilities in the data's columns"
    parts = given.name_or_path or run.model.name_or_path, given.adapter
    return " with the adapter ".join(part for part in parts if part)


def _table(name: str, pairs: PairTokens, found: Mapping[str, Estimate]) -> str:
    dropped = f", {pairs.dropped:,} dropped" if pairs.dropped else ""
    head = f"{name}: {len(pairs):,} pairs{dropped}"
    wide = max(len(head), *map(len, found)) + 2
    lines = [f"{head:<{wide}}{'mean':>{_COLUMNS}}   {CONFIDENCE:.0%} interval"]
    for metric, (mean, low, high) in found.items():
        interval = "" if low is None else f"   {low:.5g} .. {high:.5g}"
        lines.append(f"{metric:<{wide}}{mean:>{_COLUMNS}.5g}{interval}")
    return "\n" + "\n".join(lines)


def _plain(estimate: Estimate) -> dict[str, float | None]:
    """As JSON has it, where what is not finite is null."""
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in estimate._asdict().items()
    }


def _write(path: Path, record: Mapping) -> None:
    part = path.with_name(f".{path.name}.part")
    with stage(f"{path} cannot be written", "give another place with --output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    print(f"\nwrote {path}")
