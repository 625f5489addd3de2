"""Preference rows from files, folders and the hub."""

import logging
import os
from collections.abc import Iterable
from typing import Any

import datasets
import numpy as np

from engine.config.run import MixtureConfig, SourceConfig
from engine.data import folders
from engine.data.columns import SHAREGPT, Renamed, form_of
from engine.data.files import Rows, joined, read_files, renamed_columns, select
from engine.data.rows import PreferenceRows, Source, checked_source, one_after_another
from engine.data.stages import reading
from engine.data.text_files import data_ending
from engine.errors import InputError, stage
from engine.paths import is_url, matching_files

logger = logging.getLogger(__name__)

_ENDINGS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}


def load_mixture(mixture: MixtureConfig) -> PreferenceRows:
    """Reads every source; all rows one source after another, or drawn by weight.

    With `mixture_weights` the sources are interleaved at random (`seed`) in exactly
    those proportions, each source in its own order and no row twice, until the source
    that is shortest for its weight is used up.

    Raises:
        InputError: a source that is missing, unreadable, empty or without the columns;
            a mixture with `streaming`, which `stream_mixture` reads.
    """
    if mixture.streaming:
        raise InputError(
            "streaming=True has no effect where all rows are read; give what "
            "engine.data.stream_sources.stream_mixture returns, or remove it"
        )
    sources = tuple(_load_source(s, mixture.cache_dir) for s in mixture.informs)
    if mixture.mixture_weights is None:
        return one_after_another(sources)
    weights = np.array(mixture.mixture_weights, np.float64)
    weights /= weights.sum()
    sizes = np.array([len(source) for source in sources])
    total = (sizes / weights).min()
    # Rounding errors are far below 1e-6, and a whole number may lie just above.
    counts = np.minimum(np.floor(total * weights + 1e-6).astype(np.int64), sizes)
    source_ids = np.repeat(np.arange(len(sources)), counts)
    source_ids = np.random.default_rng(mixture.seed).permutation(source_ids)
    indices = np.empty(len(source_ids), np.int64)
    for number, count in enumerate(counts.tolist()):
        indices[source_ids == number] = np.arange(count)
    for source, count in zip(sources, counts.tolist(), strict=True):
        logger.info("%s: %d of %d rows are used", source.name, count, len(source))
    return PreferenceRows(sources=sources, source_ids=source_ids, indices=indices)


def _load_source(source: SourceConfig, cache_dir: str | None) -> Source:
    """One entry of `informs:`, sliced by its split and `num_rows`."""
    names, name, kind = named_kind(source)
    renamed = Renamed(source.columns.names())
    if kind == "hf":
        data = _read_hf(source, names, cache_dir, renamed)
    else:
        splits = {"train": existing_files(names)}
        data = _slice(name, splits, kind, source.split, cache_dir, renamed)
    data = renamed_columns(data, name, renamed)
    if source.num_rows is not None:
        data = select(data, 0, min(source.num_rows, len(data)))
    checked = checked_source(name, data)
    check_system(name, getattr(checked.data, "column_names", ()), source)
    return checked


def named_kind(source: SourceConfig) -> tuple[list[str], str, str]:
    """What a source names, all of it in one name, and the kind of its files.

    Raises:
        InputError: files of several types; an option that files have no use for.
    """
    names = source.data_files
    names = [names] if isinstance(names, str) else list(names)
    name = ", ".join(names)
    if source.split != "train":
        name = f"{name} ({source.split})"
    kind = source.type or _kind_by_ending(names)
    kind = "json" if kind == "jsonl" else kind
    if kind != "hf" and source.dataset_split_name is not None:
        raise InputError(
            f"dataset_split_name={source.dataset_split_name!r} has no effect with "
            f"{name}, which is of type {kind!r}; remove it"
        )
    return names, name, kind


def check_system(name: str, columns: Iterable[str], config: SourceConfig):
    """Refuses a column `system` that is named and, without ShareGPT's turns, unread.

    Raises:
        InputError: naming the source.
    """
    if config.columns.system is not None and form_of(columns) != SHAREGPT:
        raise InputError(
            f"{name}: columns.system={config.columns.system!r} has no effect "
            "without a column conversations; give a system message in the prompt's "
            "messages instead"
        )


def _kind_by_ending(files: list[str]) -> str:
    kinds = set()
    for file in files:
        kinds.add(_ENDINGS.get(data_ending(file), "hf"))
    if len(kinds) > 1:
        raise InputError(
            f"data_files={files} are of several types ({', '.join(sorted(kinds))}); "
            "give each type an entry of its own in informs"
        )
    return kinds.pop()


def existing_files(names: list[str]) -> list[str]:
    """The files that names and patterns mean, none of them empty."""
    files = []
    for name in names:
        if is_url(name):
            files.append(name)
            continue
        if os.path.isdir(name):
            raise InputError(f"{name} is a folder; read it with type hf, or name files")
        found = matching_files(name)
        if not found:
            raise InputError(f"{name} does not exist (from {os.getcwd()})")
        found = [path for path in found if not os.path.isdir(path)]
        if not found:
            raise InputError(
                f"{name} matches folders only; name the files in them, as in {name}/*"
            )
        for path in found:
            with stage(f"{path} cannot be read"):
                size = os.path.getsize(path)
            if size == 0:
                raise InputError(f"{path} is empty; give at least one preference pair")
        files += found
    return files


def _slice(
    name: str,
    splits: dict[str, list[str]],
    kind: str,
    split: str,
    cache_dir: str | None,
    renamed: Renamed,
    delimiter: str | None = None,
) -> Rows:
    """The rows that `split` (`train[:90%]+test`) takes of the files of each split."""
    with reading(f"{name} cannot be read as {kind}"):
        instruction = datasets.ReadInstruction.from_spec(split)
        # Only the splits that are named are read; lengths of others are never asked.
        lengths = dict.fromkeys(splits, 0)
        parts = instruction.to_absolute(lengths)
    data = {
        part.splitname: read_files(
            name, kind, splits[part.splitname], cache_dir, delimiter, renamed
        )
        for part in parts
    }
    with reading(f"{name} cannot be read as {kind}"):
        lengths |= {key: len(rows) for key, rows in data.items()}
        parts = instruction.to_absolute(lengths)
    return joined(
        [select(data[p.splitname], p.from_, max(p.from_, p.to)) for p in parts]
    )


def _read_hf(
    source: SourceConfig, names: list[str], cache_dir: str | None, renamed: Renamed
) -> Rows:
    """A hub id, a folder of data files, or a folder that `save_to_disk` wrote."""
    path = one_place(names)
    found = folders.find(path, source.dataset_split_name, cache_dir)
    if isinstance(found, dict):  # that save_to_disk wrote
        return _sliced_splits(path, found, source.split)
    if found.readable:
        return _slice(
            path,
            found.splits,
            found.kind,
            source.split,
            cache_dir,
            renamed,
            found.delimiter,
        )
    with reading(f"{path} cannot be read as a hub id"):
        data: Any = datasets.load_dataset(
            path,
            name=source.dataset_split_name,
            split=source.split,
            cache_dir=cache_dir,
        )
    assert isinstance(data, datasets.Dataset)
    return data


def one_place(names: list[str]) -> str:
    """The one hub id or folder that a source of type hf names.

    Raises:
        InputError: several names.
    """
    if len(names) != 1:
        raise InputError(
            f"data_files={names}: type hf takes one hub id or folder; give each an "
            "entry of its own in informs, or the files their type (json, csv, parquet, "
            "arrow)"
        )
    return names[0]


def _sliced_splits(path: str, saved: dict[str, datasets.Dataset], split: str) -> Rows:
    with reading(f"{path} cannot be read as hf"):
        instruction = datasets.ReadInstruction.from_spec(split)
        parts = instruction.to_absolute({k: len(v) for k, v in saved.items()})
    return joined(
        [select(saved[p.splitname], p.from_, max(p.from_, p.to)) for p in parts]
    )
