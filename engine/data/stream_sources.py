"""The sources of a mixture that is streamed: row after row, and none is kept."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import datasets

from engine.config.run import MixtureConfig, SourceConfig
from engine.data import folders
from engine.data.columns import Renamed
from engine.data.files import delimiter_of, download, escaped, parquet_files
from engine.data.json_files import json_rows
from engine.data.row_streams import CHUNK, RowStream, StreamedSource, library_rows
from engine.data.sources import check_system, existing_files, named_kind, one_place
from engine.data.stages import reading
from engine.data.text_files import csv_rows
from engine.errors import InputError


def stream_mixture(mixture: MixtureConfig) -> RowStream:
    """The sources of a mixture with `streaming`, of which no row is read yet.

    Raises:
        InputError: a source that is missing, or that cannot be streamed.
    """
    return RowStream(
        sources=tuple(_source(s, mixture.cache_dir) for s in mixture.informs),
        weights=mixture.mixture_weights,
        seed=mixture.seed,
        shuffle_buffer_size=mixture.shuffle_buffer_size,
    )


def _source(source: SourceConfig, cache_dir: str | None) -> StreamedSource:
    names, name, kind = named_kind(source)
    if not re.fullmatch(r"\w+([.-]\w+)*", source.split):
        raise InputError(
            f"split={source.split!r} of {name} cannot be streamed: where a part begins "
            "is not known before all rows are read; name one split, and take num_rows "
            "of it or files of their own"
        )
    renamed = Renamed(source.columns.names())
    if kind == "hf":
        data = _place(name, source, one_place(names), cache_dir, renamed)
    else:
        _check_split(name, source.split, ["train"])
        data = _Files(name, kind, existing_files(names), None, cache_dir, renamed)

    def rows(number: int) -> Iterator[Mapping[str, Any]]:
        if isinstance(data, _Files):
            found = data.rows()
        else:
            if isinstance(data, datasets.IterableDataset):
                data.set_epoch(number)
            found = library_rows(name, iter(data), renamed)
        return itertools.islice(found, source.num_rows)

    return StreamedSource(
        name, rows, lambda columns: check_system(name, columns, source)
    )


def _check_split(name: str, split: str, known: Iterable[str]):
    if split not in known:
        raise InputError(
            f"{name} cannot be read: there is no split {split!r}, only "
            f"{', '.join(known)}"
        )


def _place(
    name: str,
    source: SourceConfig,
    path: str,
    cache_dir: str | None,
    renamed: Renamed,
) -> "_Files | datasets.Dataset | datasets.IterableDataset":
    """A hub id, a folder of data files, or a folder that `save_to_disk` wrote."""
    found = folders.find(path, source.dataset_split_name, cache_dir)
    if isinstance(found, dict):  # which are mapped from the disk, and not held
        _check_split(name, source.split, found)
        return found[source.split].with_format(None)
    if found.readable:
        _check_split(name, source.split, found.splits)
        files = found.splits[source.split]
        return _Files(name, found.kind, files, found.delimiter, cache_dir, renamed)
    with reading(f"{path} cannot be read as a hub id"):
        data: Any = datasets.load_dataset(
            path,
            name=source.dataset_split_name,
            split=source.split,
            cache_dir=cache_dir,
            # What the hub has sent before is mapped from the disk.
            streaming=found.kind != "cache",
        )
    return data


class _Files:
    """Files of one kind, one after another. URLs are downloaded, whole, to the disk."""

    def __init__(
        self,
        name: str,
        kind: str,
        files: list[str],
        delimiter: str | None,
        cache_dir: str | None,
        renamed: Renamed,
    ):
        self._name, self._kind, self._files = name, kind, files
        self._delimiter, self._cache_dir = delimiter, cache_dir
        self._renamed = renamed

    def rows(self) -> Iterator[Mapping[str, Any]]:
        """All rows, under the names that are read."""
        if self._kind not in ("json", "csv"):
            yield from library_rows(self._name, self._library_data(), self._renamed)
            return
        for file in self._files:
            (path,) = self._local([file])
            if self._kind == "json":
                yield from json_rows(path, file, self._renamed, streamed=True)
            else:
                mark = self._delimiter or delimiter_of(file)
                yield from csv_rows(path, file, mark, self._renamed)

    def _local(self, files: list[str]) -> list[str]:
        with reading(f"{self._name} cannot be read as {self._kind}"):
            return [download(file, self._cache_dir) for file in files]

    def _library_data(self) -> Iterable[Mapping[str, Any]]:
        local = self._local(self._files)
        options: dict[str, Any] = {}
        if self._kind == "parquet":
            local = parquet_files(self._name, local, self._files, self._renamed)
            options = {"batch_size": CHUNK}  # rows; without it a row group at a time
        with reading(f"{self._name} cannot be read as {self._kind}"):
            data: Any = datasets.load_dataset(
                self._kind,
                data_files=[escaped(path) for path in local],
                split="train",
                streaming=True,
                cache_dir=self._cache_dir,
                **options,
            )
        return data
