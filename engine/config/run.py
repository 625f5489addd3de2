"""A run: which model, which data, which devices, which options, and what to do."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from engine.config.columns import ColumnsConfig
from engine.config.dpo import DPOConfig
from engine.config.fields import COUNT_LIMIT, check_count, check_types, check_within
from engine.config.lora import LoraConfig, check_dropout
from engine.config.run_file import build, read_run_file
from engine.config.streaming import check_streaming
from engine.errors import InputError
from engine.parallel.sharding import make_mesh
from engine.paths import expand

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy, as it is before training: `model:`."""

    name_or_path: str  # a directory (from the working directory), else a hub id
    tokenizer: str | None = None  # likewise; None: the one beside the model
    dtype: Dtype = "bfloat16"  # of the computation
    param_dtype: Dtype = "float32"  # of the parameters and the optimizer's state
    # What the backward recomputes; offload: as full, and what is kept is in the host's
    # memory; auto: the least that fits into the devices'.
    remat: Literal["auto", "none", "dots", "full", "offload"] = "full"
    # In which layers' gradients are added up over fsdp; null: in `dtype`. (Over data
    # they are in float32.)
    reduce_dtype: Dtype | None = None
    # Tokens of which MLPs are computed at a time, about, with remat full and offload.
    # null: 16384, on CPUs 512; 0: all.
    mlp_tile: int | None = None

    def __post_init__(self):
        check_types(self)
        check_within(self, 0, COUNT_LIMIT, "mlp_tile")
        _check_not_empty("name_or_path", self.name_or_path)
        _expand(self, "name_or_path", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen model that rewards are measured from: `reference_model:`."""

    # A directory (from the working directory), else a hub id; None: the model itself,
    # beneath `adapter`.
    name_or_path: str | None = None
    adapter: str | None = None  # a PEFT adapter on it, likewise
    dtype: Dtype | None = None  # of the computation; None: the model's

    def __post_init__(self):
        check_types(self)
        if self.name_or_path is None and self.adapter is None:
            raise InputError("name_or_path is missing")
        for name in ("name_or_path", "adapter"):
            _check_not_empty(name, getattr(self, name))
        _expand(self, "name_or_path", "adapter")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One set of preference pairs, one entry of `informs:`."""

    # A hub id or folder (type hf), or files; paths are from the working directory.
    data_files: str | tuple[str, ...]
    # None: what the files' ending says, and hf where it says nothing.
    type: Literal["hf", "json", "jsonl", "csv", "parquet", "arrow"] | None = None
    split: str = "train"  # with datasets' slices: train[:90%]
    dataset_split_name: str | None = None  # the hub data set's subset, for type hf
    num_rows: int | None = None  # use only the first so many
    # What the files call the columns that are read, where they call them otherwise.
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)

    def __post_init__(self):
        check_types(self)
        if not self.data_files or "" in tuple(self.data_files):
            raise InputError(f"data_files={self.data_files!r} must name something")
        if self.dataset_split_name is not None and self.type not in (None, "hf"):
            raise InputError(
                f"dataset_split_name={self.dataset_split_name!r} has no effect with "
                f"type {self.type!r}; remove it"
            )
        check_count(self, "num_rows")
        _expand(self, "data_files")


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """The sources of one data set: `mixture:` and `eval_mixture:`."""

    informs: tuple[SourceConfig, ...]  # EasyDeL's word for sources, as in its run files
    # The sources' shares of the rows; None: all rows, one source after another.
    mixture_weights: tuple[float, ...] | None = None
    cache_dir: str | None = None  # None: where `datasets` keeps its own
    seed: int = 42  # of the draw between sources
    # Read rows as they are needed, and keep none: for `mixture` only.
    streaming: bool = False
    # With streaming: pairs among which the next one is drawn. None: 1000; 0 or 1: the
    # rows' own order.
    shuffle_buffer_size: int | None = None

    def __post_init__(self):
        check_types(self)
        if not self.informs:
            raise InputError("informs=[] must list at least one source")
        _expand(self, "cache_dir")
        if self.shuffle_buffer_size is not None and not self.streaming:
            raise InputError(
                f"shuffle_buffer_size={self.shuffle_buffer_size} has no effect without "
                "streaming, as all pairs are shuffled; remove it"
            )
        check_within(self, 0, COUNT_LIMIT, "shuffle_buffer_size")
        check_within(self, 0, 2**32, "seed")
        if self.mixture_weights is None:
            return
        if len(self.mixture_weights) != len(self.informs):
            raise InputError(
                f"mixture_weights has {len(self.mixture_weights)} entries, but informs "
                f"has {len(self.informs)}; give one weight for each source"
            )
        if min(self.mixture_weights) <= 0:
            raise InputError(
                f"mixture_weights={list(self.mixture_weights)} must all be greater "
                "than 0"
            )
        if math.isinf(sum(self.mixture_weights)):
            raise InputError(
                f"mixture_weights={list(self.mixture_weights)} have an infinite sum; "
                "give smaller ones, as only their ratios count"
            )


@dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """Devices along each axis of the mesh: `sharding:`. One may be -1: all the rest."""

    data: int = 1  # batches split, parameters copied
    fsdp: int = -1  # batches and parameters split
    tensor: int = 1  # each layer's work split
    # Each row's tokens and the parameters split, for long rows; not -1.
    sequence: int = 1

    def __post_init__(self):
        check_types(self)
        if self.sequence < 1:
            raise InputError(
                f"sequence={self.sequence} must be at least 1: devices that the tokens "
                "of each row are split over"
            )
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise InputError(f"{name}={size} must be at least 1, or -1: the rest")
        rest = [name for name, size in sizes.items() if size == -1]
        if len(rest) > 1:
            raise InputError(
                f"{rest[1]}=-1 cannot be, as {rest[0]} is -1 (all the devices left) too"
            )

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh of these sizes over `devices` (all by default).

        Raises:
            InputError: the sizes do not fit the devices.
        """
        return make_mesh(
            self.data, self.fsdp, self.tensor, devices, sequence=self.sequence
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run file."""

    model: ModelConfig  # what is trained
    mixture: MixtureConfig  # the pairs that it is trained on
    lora: LoraConfig | None = None  # None: every parameter is trained
    reference_model: ReferenceConfig | None = None  # None: the policy before training
    eval_mixture: MixtureConfig | None = None  # pairs that are held out
    # How models and batches are split over devices.
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    # Loss, optimizer, lengths, batches, reports.
    trainer: DPOConfig = field(default_factory=DPOConfig)
    # In order; `dpo train` and `dpo validate` do what they are called instead.
    actions: tuple[Literal["train", "validate", "precompute"], ...] = ()

    def __post_init__(self):
        check_types(self)
        if self.reference_model is not None and self.trainer.without_reference:
            raise InputError(
                "reference_model has no effect with "
                f"trainer.{self.trainer.without_reference}; remove one"
            )
        reference = self.reference_model
        if self.lora is None and reference and reference.name_or_path is None:
            raise InputError(
                "reference_model.name_or_path is missing; only with lora is its "
                "adapter on the model's own weights"
            )
        dropout = None if self.lora is None else self.lora.lora_dropout
        check_dropout(self.trainer, dropout, ("trainer.", "lora."))
        if self.mixture.streaming:
            size = self.mixture.shuffle_buffer_size
            check_streaming(self.trainer, size, "trainer.")
        if self.eval_mixture is not None and self.eval_mixture.streaming:
            raise InputError(
                "eval_mixture.streaming=True cannot be: each evaluation goes over all "
                "pairs of a data set that is held; remove it (num_rows bounds a source)"
            )
        if self.eval_mixture is None:
            if option := self.trainer.without_effect_alone():
                raise InputError(
                    f"trainer.{option} has no effect without eval_mixture; remove it "
                    "or give some data to evaluate"
                )


def load_run_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The run that a YAML file describes, with `dotted.key=value` changes.

    Keys of overrides leave out the `config.` in front; values are read as YAML.

    Raises:
        InputError: an unreadable file, an unknown or repeated key, a value that is
            wrong; one line naming the file (or the override) and the dotted key.
    """
    return build(RunConfig, read_run_file(path, overrides or []))


def _check_not_empty(name: str, value: str | None):
    if value == "":
        raise InputError(f"{name}='' must not be empty")


def _expand(config: Any, *names: str):
    """Replaces paths (None and tuples of them allowed) in a frozen dataclass."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, tuple):
            value = tuple(expand(path) for path in value)
        elif value is not None:
            value = expand(value)
        object.__setattr__(config, name, value)
