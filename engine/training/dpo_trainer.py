"""`DPOTrainer`: what a Python user makes a run of."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from engine.config.dpo import DPOConfig
from engine.config.lora import LoraConfig
from engine.config.show import plain
from engine.errors import InputError
from engine.models import (
    Decoder,
    DecoderConfig,
    check_checkpoint,
    check_save_directory,
    load_model,
    resolve_directory,
)
from engine.parallel.sharding import make_mesh, mesh_words
from engine.training.about import About, reference_words
from engine.training.events import Listener
from engine.training.identity import flat
from engine.training.lora import lora_policy, reference_decoder, with_lora
from engine.training.prepare import (
    EVAL,
    PreferenceData,
    TrainingData,
    prepare,
    prepare_pairs,
    prepare_training,
)
from engine.training.trainer import Trainer


class DPOTrainer(Trainer):
    """Preference-tunes a model on pairs of completions.

    Args:
        model: what `load_model` returns, or a directory or hub id to load. Its arrays
            become the trainer's, and it is unusable while `train` runs; when that
            returns it holds the trained ones.
        reference_model: what rewards are measured from; None is `model` as it is now.
            A decoder's arrays become the trainer's as well, in the dtype of its
            computation (float32 where it is synced), or are deleted when its
            log-probabilities are precomputed.
        arguments: every option.
        train_dataset: rows with prompt, chosen and rejected, as text or as messages;
            a `datasets.Dataset`, a list of dicts, or what `prepare_pairs` returns. A
            `datasets.IterableDataset` is streamed, shuffled among 1000 pairs unless it
            comes through `stream_rows`.
        eval_dataset: likewise, held out; or a dict of such data sets, by name.
        processing_class: the tokenizer.
        lora: train an adapter on `model`, which stays as it is, in the dtype of the
            computation; `trainer.model` is both. `model` is the reference, or its
            adapter before training where `lora.adapter` is given.
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
        train_dataset: TrainingData,
        eval_dataset: PreferenceData | Mapping[str, PreferenceData] | None = None,
        processing_class: PreTrainedTokenizerBase,
        lora: LoraConfig | None = None,
        listeners: Iterable[Listener] = (),
    ):
        """Tokenises the data, checks everything, makes the state; writes nothing."""
        arguments = DPOConfig() if arguments is None else arguments
        _check_types(arguments, processing_class, model, reference_model, lora)
        sources = {
            "model": _directory(model),
            "reference_model": _directory(reference_model),
            "processing_class": processing_class.name_or_path or None,
            "lora.adapter": lora and lora.adapter,
        }
        check_save_directory(arguments.save_directory, sources)
        pairs = prepare_training(arguments, train_dataset, processing_class)
        evaluations = {
            prefix: prepare_pairs(arguments, data, processing_class)
            for prefix, data in _named(eval_dataset).items()
        }
        mesh = model.mesh if isinstance(model, Decoder) else make_mesh()
        _check_reference(model, reference_model)
        run = prepare(
            arguments,
            mesh=mesh,
            model=with_lora(_config(model), lora, _name(model)),
            reference=None if reference_model is None else _config(reference_model),
            tokenizer=processing_class,
            train=pairs,
            evaluations=evaluations,
            about=_about(arguments, model, reference_model, lora),
            reference_dtype=(
                reference_model.dtype if isinstance(reference_model, Decoder) else None
            ),
        )
        # Only now, as every check is passed.
        if not isinstance(model, Decoder):
            param_dtype = "float32" if lora is None else "bfloat16"
            model = load_model(model, mesh=mesh, param_dtype=param_dtype)
        policy, reference = model, reference_model
        if lora is not None and run.model.adapter is not None:
            seed = arguments.seed
            policy = lora_policy(model, lora, run.model.adapter, seed=seed)
            if reference is None and lora.adapter is None:
                reference = model
        if isinstance(reference, str | Path):
            synced = arguments.sync_ref_model
            reference = reference_decoder(
                policy, model, name=reference, adapter=None, synced=synced
            )
        named = {"model": _name(model), "lora": lora}
        super().__init__(run, policy, reference, listeners, config=flat(named))


def _config(model: Decoder | str | Path) -> DecoderConfig:
    """A model's configuration, without its weights."""
    if isinstance(model, Decoder):
        return model.config
    return check_checkpoint(resolve_directory(model))


def _check_reference(model: Decoder | str | Path, reference: Any) -> None:
    """Refuse a decoder that does not lie where the policy does.

    Raises:
        InputError: another mesh.
    """
    if not isinstance(model, Decoder) or not isinstance(reference, Decoder):
        return
    if reference.mesh != model.mesh:
        raise InputError(
            f"reference_model lies on another mesh ({_shown(reference)}) than model "
            f"({_shown(model)}); load both with the same mesh"
        )


def _shown(model: Decoder) -> str:
    devices = [device.id for device in model.mesh.devices.flat]
    return f"{mesh_words(model.mesh.shape)} of devices {devices}"


def _directory(model: Decoder | str | Path | None) -> str | Path | None:
    """Where a model is, or came from."""
    if not isinstance(model, Decoder):
        return model
    return None if model.config.origin is None else model.config.origin.directory


def _name(model: Decoder | str | Path) -> str | None:
    """How a model is named, for whoever loads an adapter of it."""
    name = _directory(model)
    return None if name is None else str(name)


def _about(
    arguments: DPOConfig,
    model: Decoder | str | Path,
    reference: Decoder | str | Path | None,
    lora: LoraConfig | None,
) -> About:
    """What is said of the run; what was handed over as arrays has no other name."""
    made = "a model made in Python"
    name = _name(model) or made
    words = reference_words(
        arguments,
        name,
        lora,
        given=reference is not None,
        name=made if reference is None else _name(reference) or made,
    )
    param_dtype = "float32"
    if isinstance(model, Decoder) and lora is None:
        param_dtype = model.embed[...].dtype.name
    config: dict[str, Any] = {"model": {"name_or_path": name}, "trainer": arguments}
    if lora is not None:
        config["lora"] = lora
    return About(
        model=name,
        reference=words,
        dtype=model.dtype.name if isinstance(model, Decoder) else "bfloat16",
        param_dtype=param_dtype,
        config=plain(config),
    )


def _named(data: Any) -> dict[str, Any]:
    """Evaluation sets by the prefix of their metrics' names."""
    if data is None:
        return {}
    if isinstance(data, Mapping):
        return {f"{EVAL}{name}_": one for name, one in data.items()}
    return {EVAL: data}


def _check_types(
    arguments: Any, tokenizer: Any, model: Any, reference: Any, lora: Any
) -> None:
    """Refuse what is not what the parameter's name says.

    Raises:
        InputError: naming the parameter and what was given.
    """
    models = Decoder | str | Path
    load = "engine.load_model(...)"
    for name, value, wanted, way in (
        ("lora", lora, LoraConfig | None, "engine.LoraConfig(...)"),
        ("arguments", arguments, DPOConfig, "engine.DPOConfig(...)"),
        (
            "processing_class",
            tokenizer,
            PreTrainedTokenizerBase,
            "transformers' AutoTokenizer.from_pretrained(...)",
        ),
        ("model", model, models, load),
        ("reference_model", reference, models | None, load),
    ):
        if not isinstance(value, wanted):
            raise InputError(
                f"{name} is a {type(value).__name__}; give what {way} returns"
            )
