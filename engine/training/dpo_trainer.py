"""`DPOTrainer`: what a Python user makes a run of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from engine.config.dpo import DPOConfig
from engine.errors import InputError
from engine.models import Decoder, check_save_directory, load_model
from engine.training.events import Listener
from engine.training.prepare import EVAL, PreferenceData, prepare, prepare_pairs
from engine.training.trainer import Trainer


class DPOTrainer(Trainer):
    """Preference-tunes a model on pairs of completions.

    Args:
        model: what `load_model` returns, or a directory or hub id to load. Its arrays
            become the trainer's, and it is unusable while `train` runs; when that
            returns it holds the trained ones.
        reference_model: what rewards are measured from; None is `model` as it is now.
            A decoder's arrays become the trainer's as well.
        arguments: every option.
        train_dataset: rows with prompt, chosen and rejected, as text or as messages;
            a `datasets.Dataset`, a list of dicts, or what `prepare_pairs` returns.
        eval_dataset: likewise, held out; or a dict of such data sets, by name.
        processing_class: the tokenizer.
        listeners: are told of every step and every line of metrics, after the file.
    Raises:
        InputError: data, options, model and mesh that do not fit together.
    """

    def __init__(
        self,
        *,
        model: Decoder | str | Path,
        reference_model: Decoder | str | Path | None = None,
        arguments: DPOConfig | None = None,
        train_dataset: PreferenceData,
        eval_dataset: PreferenceData | Mapping[str, PreferenceData] | None = None,
        processing_class: PreTrainedTokenizerBase,
        listeners: tuple[Listener, ...] = (),
    ):
        """Tokenises the data, checks everything, makes the state; writes nothing."""
        arguments = arguments or DPOConfig()
        _check_types(arguments, processing_class)
        sources = {
            "model": _directory(model),
            "reference_model": _directory(reference_model),
            "processing_class": processing_class.name_or_path or None,
        }
        check_save_directory(arguments.save_directory, sources)
        pairs = prepare_pairs(arguments, train_dataset, processing_class)
        evaluations = {
            prefix: prepare_pairs(arguments, data, processing_class)
            for prefix, data in _named(eval_dataset).items()
        }
        model = model if isinstance(model, Decoder) else load_model(model)
        if isinstance(reference_model, str | Path):
            reference_model = load_model(reference_model, mesh=model.mesh)
        if reference_model is not None and reference_model.mesh != model.mesh:
            raise InputError(
                f"reference_model lies on the mesh {reference_model.mesh.shape} and "
                f"model on {model.mesh.shape}; load both with the same mesh"
            )
        run = prepare(
            arguments,
            mesh=model.mesh,
            model=model.config,
            dtype=model.dtype,
            reference=None if reference_model is None else reference_model.config,
            tokenizer=processing_class,
            train=pairs,
            evaluations=evaluations,
        )
        super().__init__(run, model, reference_model, listeners)


def _directory(model: Decoder | str | Path | None) -> str | Path | None:
    """Where a model is, or came from."""
    if not isinstance(model, Decoder):
        return model
    return None if model.config.origin is None else model.config.origin.directory


def _named(data: Any) -> dict[str, Any]:
    """Evaluation sets by the prefix of their metrics' names."""
    if data is None:
        return {}
    if isinstance(data, Mapping):
        return {f"{EVAL}{name}_": one for name, one in data.items()}
    return {EVAL: data}


def _check_types(arguments: Any, tokenizer: Any) -> None:
    """Refuse what is not what the parameter's name says.

    Raises:
        InputError: naming the parameter and what was given.
    """
    for name, value, wanted, way in (
        ("arguments", arguments, DPOConfig, "engine.DPOConfig(...)"),
        (
            "processing_class",
            tokenizer,
            PreTrainedTokenizerBase,
            "transformers' AutoTokenizer.from_pretrained(...)",
        ),
    ):
        if not isinstance(value, wanted):
            raise InputError(
                f"{name} is a {type(value).__name__}; it must be a "
                f"{wanted.__name__}: give what {way} returns"
            )
