"""What every command reads of a run file before any weight, and checks."""

from transformers import PreTrainedTokenizerBase

from engine.config.run import MixtureConfig, RunConfig
from engine.data.pairs import PairTokens
from engine.data.sources import load_mixture
from engine.models import check_checkpoint, check_save_directory, resolve_directory
from engine.models.tokenizer import load_tokenizer
from engine.parallel.sharding import make_mesh
from engine.training.compilation import keep_programs
from engine.training.prepare import EVAL, Prepared, prepare, prepare_pairs


def prepare_run(run: RunConfig) -> Prepared:
    """Read configurations, tokenizer and data, and check that all fits together.

    Raises:
        InputError: whatever training would refuse.
    """
    _check_save_directory(run)
    keep_programs()
    mesh = make_mesh(run.sharding.data, run.sharding.fsdp, run.sharding.tensor)
    model = check_checkpoint(resolve_directory(run.model.name_or_path))
    reference = None
    if run.reference_model is not None:
        name = run.reference_model.name_or_path
        reference = check_checkpoint(resolve_directory(name))
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


def _check_save_directory(run: RunConfig) -> None:
    reference = run.reference_model
    sources = {
        "model.name_or_path": run.model.name_or_path,
        "model.tokenizer": run.model.tokenizer,
        "reference_model.name_or_path": reference and reference.name_or_path,
    }
    data = {}
    for name, mixture in (("mixture", run.mixture), ("eval_mixture", run.eval_mixture)):
        for i, source in enumerate(mixture.informs if mixture else ()):
            files = source.data_files
            files = (files,) if isinstance(files, str) else files
            data[f"{name}.informs.{i}.data_files"] = files
    check_save_directory(run.trainer.save_directory, sources, data)


def _pairs(
    run: RunConfig, mixture: MixtureConfig, tokenizer: PreTrainedTokenizerBase
) -> PairTokens:
    return prepare_pairs(run.trainer, load_mixture(mixture), tokenizer)
