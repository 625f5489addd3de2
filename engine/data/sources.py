"""Preference rows from files, folders and the hub."""

import contextlib
import glob
import logging
import os
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError, DatasetsError

from engine.config.run import MixtureConfig, SourceConfig
from engine.data.rows import (
    FIELDS,
    PreferenceRows,
    Source,
    checked_source,
    one_after_another,
)
from engine.errors import InputError

logger = logging.getLogger(__name__)

_ENDINGS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_BUILDERS = {"jsonl": "json"} | {name: name for name in _ENDINGS.values()}
# A cell of a CSV file is the text that stands there, also where it reads 7, NA or null.
_CSV_AS_TEXT = {
    "keep_default_na": False,
    "converters": {field: str for field in FIELDS},
}


def load_mixture(mixture: MixtureConfig) -> PreferenceRows:
    """Reads every source; all rows one source after another, or drawn by weight.

    With `mixture_weights` the sources are interleaved at random (`seed`) in exactly
    those proportions, each source in its own order and no row twice, until the source
    that is shortest for its weight is used up.

    Raises:
        InputError: a source that is missing, unreadable, empty or without the columns.
    """
    sources = tuple(_load_source(s, mixture.cache_dir) for s in mixture.informs)
    if mixture.mixture_weights is None:
        return one_after_another(sources)
    weights = np.array(mixture.mixture_weights, np.float64)
    weights /= weights.sum()
    sizes = np.array([len(source) for source in sources])
    total = (sizes / weights).min()
    # Rounding errors are far below 1e-6, and a whole number may lie just above.
    counts = np.minimum(np.floor(total * weights + 1e-6).astype(np.int64), sizes)
    of = np.repeat(np.arange(len(sources)), counts)
    of = np.random.default_rng(mixture.seed).permutation(of)
    rows = np.empty(len(of), np.int64)
    for number, count in enumerate(counts.tolist()):
        rows[of == number] = np.arange(count)
    for source, count in zip(sources, counts.tolist(), strict=True):
        logger.info("%s: %d of %d rows are used", source.name, count, len(source))
    return PreferenceRows(sources=sources, of=of, rows=rows)


def _load_source(source: SourceConfig, cache_dir: str | None) -> Source:
    """One entry of `informs:`, sliced by its split and `num_rows`."""
    files = source.data_files
    files = [files] if isinstance(files, str) else list(files)
    name = ", ".join(files)
    if source.split != "train":
        name = f"{name} ({source.split})"
    kind = source.type or _kind_by_ending(files)
    try:
        with _quiet():
            if kind == "hf":
                data = _read_hf(source, files, cache_dir)
            else:
                _check_files(files)
                extra = _CSV_AS_TEXT if kind == "csv" else {}
                data = datasets.load_dataset(
                    _BUILDERS[kind],
                    data_files=files,
                    split=source.split,
                    cache_dir=cache_dir,
                    **extra,
                )
    except InputError:
        raise
    except _READ_ERRORS as error:
        what = kind
        if kind == "hf" and not os.path.isdir(files[0]):
            what = "a hub id, and is no folder here"
        reason = _reason(error)
        raise InputError(f"{name} cannot be read as {what}: {reason}") from error
    assert isinstance(data, datasets.Dataset)
    if source.num_rows is not None:
        data = data.select(range(min(source.num_rows, len(data))))
    return checked_source(name, data)


# What `datasets`, the hub client, pandas and Arrow raise on bad files and names.
_READ_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    StopIteration,
    DatasetsError,
)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, without the wrapper that says nothing."""
    wrapped = isinstance(error, DatasetGenerationError)
    while wrapped and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    reason = lines[0].strip() if lines else type(error).__name__
    if "corresponds to no data" in reason:
        reason += " It has no rows, or the split's slice leaves none."
    return reason


def _kind_by_ending(files: list[str]) -> str:
    kinds = set()
    for file in files:
        stem, ending = os.path.splitext(file)
        if ending in (".gz", ".zst", ".xz", ".bz2"):
            ending = os.path.splitext(stem)[1]
        kinds.add(_ENDINGS.get(ending, "hf"))
    if len(kinds) > 1:
        raise InputError(
            f"data_files={files} are of several types ({', '.join(sorted(kinds))}); "
            "give each type an entry of its own in informs"
        )
    return kinds.pop()


def _check_files(files: list[str]):
    """Refuses, before any reader runs, files that are not there or hold nothing."""
    for file in files:
        if "://" in file:
            continue
        if os.path.isdir(file):
            raise InputError(f"{file} is a folder; read it with type hf, or name files")
        found = [file] if os.path.exists(file) else glob.glob(file, recursive=True)
        if not found:
            raise InputError(f"{file} does not exist (from {os.getcwd()})")
        for path in found:
            if os.path.getsize(path) == 0:
                raise InputError(f"{path} is empty; give at least one preference pair")


def _read_hf(source: SourceConfig, files: list[str], cache_dir: str | None) -> Any:
    """A hub id, a folder of data files, or a folder that `save_to_disk` wrote."""
    if len(files) != 1:
        raise InputError(
            f"data_files={files}: type hf takes one hub id or folder; give each an "
            "entry of its own in informs, or the files their type (json, csv, parquet, "
            "arrow)"
        )
    path = files[0]
    if os.path.isfile(path):
        raise InputError(
            f"{path} is a file whose name does not tell its type; set type to json, "
            "csv, parquet or arrow (plain text has no chosen and rejected)"
        )
    names = os.listdir(path) if os.path.isdir(path) else []
    if "dataset_dict.json" in names or "state.json" in names:
        return _read_saved(path, source.split)
    if not names and (os.path.isabs(path) or path.startswith((".", "~"))):
        raise InputError(f"{path} is not a folder with data in it")
    return datasets.load_dataset(
        path, name=source.dataset_split_name, split=source.split, cache_dir=cache_dir
    )


def _read_saved(path: str, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(path)
    if isinstance(saved, datasets.Dataset):
        saved = datasets.DatasetDict({str(saved.split or "train"): saved})
    instruction = datasets.ReadInstruction.from_spec(split)
    parts = instruction.to_absolute({str(k): len(v) for k, v in saved.items()})
    return datasets.concatenate_datasets(
        [saved[p.splitname].select(range(p.from_, max(p.from_, p.to))) for p in parts]
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """`datasets` without its bars and its own error lines: ours say it once."""
    bars = datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
