"""All rows of data files of one kind, whichever it is."""

import glob

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from engine.data.columns import FIELDS, Renamed
from engine.data.json_files import read_json
from engine.data.stages import reading
from engine.data.text_files import PackedRows, data_ending, read_csv
from engine.errors import InputError
from engine.paths import is_url

Rows = datasets.Dataset | PackedRows


def read_files(
    name: str,
    kind: str,
    files: list[str],
    cache_dir: str | None,
    delimiter: str | None,
    renamed: Renamed,
) -> Rows:
    """All rows of files of one kind, in order; text already under the names read."""
    with reading(f"{name} cannot be read as {kind}"):
        local = [download(file, cache_dir) for file in files]
    if kind in ("json", "csv"):
        parts: list[Rows] = []
        for path, file in zip(local, files, strict=True):
            if kind == "json":
                parts.append(read_json(path, file, renamed))
            else:
                mark = delimiter or delimiter_of(file)
                parts.append(read_csv(path, file, mark, renamed))
        return joined(parts)
    if kind == "parquet":
        local = parquet_files(name, local, files, renamed)
    with reading(f"{name} cannot be read as {kind}"):
        data = datasets.load_dataset(
            kind,
            data_files=[escaped(path) for path in local],
            split="train",
            cache_dir=cache_dir,
        )
    assert isinstance(data, datasets.Dataset)
    return data


def delimiter_of(file: str) -> str:
    """What is between the cells of a file of text, by its ending."""
    return "\t" if data_ending(file) == ".tsv" else ","


def parquet_files(
    name: str, local: list[str], files: list[str], renamed: Renamed
) -> list[str]:
    """Those of the files that have rows; all have the columns that are read.

    Args:
        local: where each of `files` is.
    Raises:
        InputError: no rows at all, or columns of other types than in another file.
    """
    with reading(f"{name} cannot be read as parquet"):
        # One without rows stops the reader, with other files beside it or not.
        rows = {path: pq.read_metadata(path).num_rows for path in local}
        schemas = {path: pq.read_schema(path) for path in local if rows[path]}
    if not schemas:
        raise InputError(f"{name} has no rows; give at least one pair")
    names = dict(zip(local, files, strict=True))
    found = {names[path]: schema for path, schema in schemas.items()}
    for file, schema in found.items():
        renamed.check(file, schema.names)
    _check_columns({x: _columns(schema, renamed) for x, schema in found.items()})
    return list(schemas)


def _check_columns(columns: dict[str, dict[str, str]]):
    """Refuses files (by name) whose needed columns are not of the same types."""
    (first, wanted), *rest = columns.items()
    for name, found in rest:
        for field in FIELDS:
            ours, theirs = wanted.get(field), found.get(field)
            if ours != theirs:
                raise InputError(
                    f"{name}: the column {field!r} is {theirs or 'not there'}, but "
                    f"{ours or 'not there'} in {first}; give each an entry of its own "
                    "in informs"
                )


def _columns(schema: pa.Schema, renamed: Renamed) -> dict[str, str]:
    """The type of each column that we read; texts of all widths are one type."""
    types = {field.name: str(field.type) for field in schema}
    return {
        name: kind.replace("large_string", "string")
        for name, kind in renamed.row(types).items()
        if name in FIELDS
    }


def renamed_columns(data: Rows, name: str, renamed: Renamed) -> Rows:
    """The rows under the names that are read; files of text have been read so.

    Raises:
        InputError: a column that is not there.
    """
    if not isinstance(data, datasets.Dataset) or not renamed.names:
        return data
    renamed.check(name, data.column_names)
    own = {column: column for column in data.column_names}
    kept = renamed.row(own)  # by the name that is read, the file's own
    data = data.select_columns(list(kept.values()))
    return data.rename_columns({c: k for k, c in kept.items() if c != k})


def select(data: Rows, start: int, stop: int) -> Rows:
    """The rows from `start` up to, but not with, `stop`."""
    if isinstance(data, datasets.Dataset):
        return data.select(range(start, stop))
    return data[start:stop]


def joined(parts: list[Rows]) -> Rows:
    """Parts of one kind, end to end."""
    first, *rest = parts
    if isinstance(first, datasets.Dataset):
        return datasets.concatenate_datasets(parts)  # pyright: ignore
    for part in rest:
        assert isinstance(part, PackedRows)
        first = first.joined(part)
    return first


def download(file: str, cache_dir: str | None) -> str:
    """The local copy of a URL (unpacked); a local file is its own."""
    if not is_url(file):
        return file
    config = datasets.DownloadConfig(cache_dir=cache_dir)
    manager = datasets.DownloadManager(download_config=config)
    return str(manager.download_and_extract(file))


def escaped(path: str) -> str:
    """`path` as a pattern that means this file alone."""
    return path if is_url(path) else glob.escape(path)
