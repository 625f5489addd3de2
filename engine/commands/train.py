"""The actions of a run file: train, and validate."""

import math
from contextlib import ExitStack
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine.config.run import MixtureConfig, RunConfig
from engine.data.pairs import PairTokens, load_mixture
from engine.errors import InputError
from engine.models import DecoderConfig, load_model
from engine.models.weights import (
    Reader,
    check_tensors,
    read_config,
    resolve_directory,
)
from engine.parallel.sharding import check_mesh, make_mesh
from engine.training.preparation import (
    check_vocabulary,
    plan_evaluation,
    plan_training,
    prepare_pairs,
    total_steps,
)
from engine.training.trainer import DPOTrainer


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id.

    Raises:
        InputError: none is there, or it cannot be read.
    """
    directory = resolve_directory(name_or_path)
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, HfHubHTTPError, HFValidationError) as error:
        why = " ".join(str(error).split())
        raise InputError(
            f"{directory}: the tokenizer cannot be loaded ({why}); put its files "
            "there, or name another one with model.tokenizer"
        ) from error


def train_from_config(run: RunConfig) -> None:
    """Train as a run file says; data is checked before any weight is loaded."""
    mesh = make_mesh(run.sharding.data, run.sharding.fsdp, run.sharding.tensor)
    tokenizer = load_tokenizer(run.model.tokenizer or run.model.name_or_path)
    pairs = _pairs(run, run.mixture, tokenizer)
    eval_pairs = _pairs(run, run.eval_mixture, tokenizer)
    assert pairs is not None, "a run has a mixture"
    model = load_model(
        run.model.name_or_path,
        mesh=mesh,
        dtype=run.model.dtype,
        param_dtype=run.model.param_dtype,
        remat=run.model.remat,
    )
    reference = None
    if run.reference_model is not None:
        synced = run.trainer.sync_ref_model
        reference = load_model(
            run.reference_model.name_or_path,
            mesh=mesh,
            dtype=run.model.dtype,
            # One that never changes needs no more digits than are computed with.
            param_dtype=run.model.param_dtype if synced else run.model.dtype,
            remat=run.model.remat,
        )
    DPOTrainer(
        model=model,
        reference_model=reference,
        arguments=run.trainer,
        train_dataset=pairs,
        eval_dataset=eval_pairs,
        processing_class=tokenizer,
    ).train()


def _pairs(
    run: RunConfig, mixture: MixtureConfig | None, tokenizer: PreTrainedTokenizerBase
) -> PairTokens | None:
    if mixture is None:
        return None
    return prepare_pairs(run.trainer, load_mixture(mixture), tokenizer)


def validate_config(run: RunConfig) -> None:
    """Check a run file, its checkpoints and its data, and print what would be run.

    Raises:
        InputError: whatever training would refuse, before loading any weights.
    """
    mesh = make_mesh(run.sharding.data, run.sharding.fsdp, run.sharding.tensor)
    names = [run.model.name_or_path]
    if run.reference_model is not None:
        names.append(run.reference_model.name_or_path)
    configs = []
    for directory in map(resolve_directory, names):
        configs.append(read_config(directory))
        check_mesh(configs[-1], mesh)
        with ExitStack() as stack:
            check_tensors(configs[-1], Reader(directory, stack).shapes(), directory)
    tokenizer = load_tokenizer(run.model.tokenizer or run.model.name_or_path)
    pairs = _pairs(run, run.mixture, tokenizer)
    eval_pairs = _pairs(run, run.eval_mixture, tokenizer)
    assert pairs is not None, "a run has a mixture"
    check_vocabulary(configs[0], tokenizer, pairs, eval_pairs)
    plan = plan_training(run.trainer, pairs, mesh)
    print(f"model       {names[0]}: {configs[0].model_type}, {_size(configs[0])}")
    if run.trainer.reference_free:
        print("reference   none")
    else:
        print(f"reference   {names[-1] if names[1:] else 'a frozen copy of the model'}")
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    print(f"mesh        {axes} on {mesh.devices.flat[0].device_kind}")
    print(f"train       {_describe(pairs)}")
    shapes = ", ".join(f"{s} ({t} scored a device)" for s, t in plan.shapes)
    size = run.trainer.total_batch_size
    print(f"batches     of {size} pairs, tokens padded to {shapes}")
    print(
        f"steps       {total_steps(run.trainer, plan)}, "
        f"{plan.batches_per_epoch} an epoch"
    )
    if eval_pairs is not None:
        plan_evaluation(run.trainer, eval_pairs, mesh)
        print(f"evaluation  {_describe(eval_pairs)}")
    print(f"writes to   {Path(run.trainer.save_directory)}")
    print("valid")


def _size(config: DecoderConfig) -> str:
    count = sum(
        math.prod(one.shape) * (config.num_layers if one.stacked else 1)
        for one in config.parameters().values()
    )
    return f"{count:,} parameters"


def _describe(pairs: PairTokens) -> str:
    longest = int(pairs.lengths.max())
    dropped = f", {pairs.dropped} dropped" if pairs.dropped else ""
    return f"{len(pairs)} pairs{dropped}, the longest of {longest} tokens"
