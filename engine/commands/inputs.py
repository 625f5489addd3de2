"""What every command reads of a run file before any weight, and checks."""

from dataclasses import dataclass

from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from engine.config.run import RunConfig
from engine.config.show import plain
from engine.data.pair_streams import PairStream
from engine.data.pairs import PairTokens, PreferenceRows
from engine.data.sources import load_mixture
from engine.data.stream_sources import stream_mixture
from engine.models import (
    DecoderConfig,
    check_checkpoint,
    check_save_directory,
    resolve_directory,
)
from engine.models.tokenizer import load_tokenizer
from engine.parallel import processes
from engine.training.about import About, reference_words
from engine.training.compilation import keep_programs
from engine.training.lora import named_reference, with_lora
from engine.training.prepare import EVAL, Prepared, prepare, prepare_pairs
from engine.training.streams import prepare_stream


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The data of a run, by the prefix of its metrics' names: "", and `EVAL`."""

    tokenizer: PreTrainedTokenizerBase
    rows: dict[str, PreferenceRows]
    pairs: dict[str, PairTokens]
    stream: PairStream | None = None  # the training set, where it is streamed


def read_data(run: RunConfig, first_rows: int = 0) -> RunData:
    """Read tokenizer and data.

    Of several processes the first one does so first, and keeps the tokens: where the
    others share its cache they map that file into memory.

    Args:
        first_rows: how many rows of a training set that is streamed to hold.
    Raises:
        InputError: a tokenizer or rows that training would refuse.
    """
    with processes.first_goes_first():
        return _read_data(run, first_rows)


def _read_data(run: RunConfig, first_rows: int) -> RunData:
    tokenizer = load_tokenizer(run.model.tokenizer or run.model.name_or_path)
    rows, stream = {}, None
    if run.mixture.streaming:
        some = stream_mixture(run.mixture)
        stream = prepare_stream(run.trainer, some, tokenizer)
        if first_rows:
            rows[""] = some.first(first_rows)
    else:
        rows[""] = load_mixture(run.mixture)
    if run.eval_mixture is not None:
        rows[EVAL] = load_mixture(run.eval_mixture)
    pairs = {
        prefix: prepare_pairs(run.trainer, some, tokenizer)
        for prefix, some in rows.items()
    }
    return RunData(tokenizer=tokenizer, rows=rows, pairs=pairs, stream=stream)


def prepare_run(run: RunConfig, data: RunData | None = None) -> Prepared:
    """Read configurations, tokenizer and data, and check that all fits together.

    Args:
        data: what `read_data` made of this run.
    Raises:
        InputError: whatever training would refuse.
    """
    check_destination(run)
    keep_programs()
    mesh = run.sharding.mesh()
    model = check_checkpoint(resolve_directory(run.model.name_or_path))
    reference = reference_of(run, model)
    model = with_lora(model, run.lora, run.model.name_or_path)
    data = data or read_data(run)
    return prepare_data(run, data, mesh=mesh, model=model, reference=reference)


def prepare_data(
    run: RunConfig,
    data: RunData,
    *,
    mesh: Mesh,
    model: DecoderConfig,
    reference: DecoderConfig | None,
) -> Prepared:
    """The run on data that is read, with these models, on this mesh.

    Raises:
        InputError: whatever does not fit together.
    """
    evaluations = dict(data.pairs)
    held = evaluations.pop("", None)
    train = data.stream or held
    assert train is not None
    return prepare(
        run.trainer,
        mesh=mesh,
        model=model,
        reference=reference,
        tokenizer=data.tokenizer,
        train=train,
        evaluations=evaluations,
        about=about(run),
        reference_dtype=run.reference_model and run.reference_model.dtype,
    )


def about(run: RunConfig) -> About:
    """What is said of a run, and its whole configuration."""
    model, given = run.model, run.reference_model
    words = reference_words(
        run.trainer,
        model.name_or_path,
        run.lora,
        given=given is not None,
        name=given and given.name_or_path,
        adapter=given and given.adapter,
        dtype=given and given.dtype,
    )
    return About(
        model=model.name_or_path,
        reference=words,
        dtype=model.dtype,
        param_dtype=model.param_dtype,
        config=plain(run),
    )


def reference_of(run: RunConfig, base: DecoderConfig) -> DecoderConfig | None:
    """The configuration of the reference that a run file names; None: it names none."""
    return named_reference(
        run, base, lambda name: check_checkpoint(resolve_directory(name))
    )


def check_destination(run: RunConfig) -> None:
    """Refuse a save_directory in which a model may not be saved."""
    reference = run.reference_model
    sources = {
        "model.name_or_path": run.model.name_or_path,
        "model.tokenizer": run.model.tokenizer,
        "reference_model.name_or_path": reference and reference.name_or_path,
        "reference_model.adapter": reference and reference.adapter,
        "lora.adapter": run.lora and run.lora.adapter,
    }
    data = {}
    for name, mixture in (("mixture", run.mixture), ("eval_mixture", run.eval_mixture)):
        for i, source in enumerate(mixture.informs if mixture else ()):
            files = source.data_files
            files = (files,) if isinstance(files, str) else files
            data[f"{name}.informs.{i}.data_files"] = files
    check_save_directory(run.trainer.save_directory, sources, data)
