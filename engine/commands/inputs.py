"""What every command reads of a run file before any weight, and checks."""

from contextlib import ExitStack

from transformers import PreTrainedTokenizerBase

from engine.config.run import MixtureConfig, RunConfig
from engine.data.pairs import PairTokens
from engine.data.sources import load_mixture
from engine.errors import stage
from engine.models import DecoderConfig
from engine.models.tokenizer import load_tokenizer
from engine.models.weights import (
    Reader,
    check_tensors,
    read_config,
    resolve_directory,
)
from engine.parallel.sharding import make_mesh
from engine.training.compilation import keep_programs
from engine.training.prepare import EVAL, Prepared, prepare, prepare_pairs


def prepare_run(run: RunConfig) -> Prepared:
    """Read configurations, tokenizer and data, and check that all fits together.

    Raises:
        InputError: whatever training would refuse.
    """
    keep_programs()
    with stage("the devices cannot be used", "see JAX_PLATFORMS"):
        mesh = make_mesh(run.sharding.data, run.sharding.fsdp, run.sharding.tensor)
    model = _check_checkpoint(run.model.name_or_path)
    reference = None
    if run.reference_model is not None:
        reference = _check_checkpoint(run.reference_model.name_or_path)
    tokenizer = load_tokenizer(run.model.tokenizer or run.model.name_or_path)
    evaluations: dict[str, PairTokens] = {}
    train = _pairs(run, run.mixture, tokenizer)
    if run.eval_mixture is not None:
        evaluations[EVAL] = _pairs(run, run.eval_mixture, tokenizer)
    return prepare(
        run.trainer,
        mesh=mesh,
        model=model,
        dtype=run.model.dtype,
        reference=reference,
        tokenizer=tokenizer,
        train=train,
        evaluations=evaluations,
    )


def _check_checkpoint(name_or_path: str) -> DecoderConfig:
    """The configuration of a checkpoint whose tensors are all there."""
    directory = resolve_directory(name_or_path)
    config = read_config(directory)
    with ExitStack() as opened:
        check_tensors(config, Reader(directory, opened).shapes(), directory)
    return config


def _pairs(
    run: RunConfig, mixture: MixtureConfig, tokenizer: PreTrainedTokenizerBase
) -> PairTokens:
    return prepare_pairs(run.trainer, load_mixture(mixture), tokenizer)
