"""Preference rows in memory, each knowing the source and the row that it came from."""

import json
import logging
from collections.abc import Buffer, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import datasets
import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from engine.config.fields import did_you_mean
from engine.data.columns import FIELDS, FORMS, OF_ANY_FORM, check_names, form_of
from engine.data.stages import reading
from engine.errors import InputError

logger = logging.getLogger(__name__)

_HASH_ROWS = 4096  # rows hashed at a time, whatever the chunks of the table


@runtime_checkable
class Origins(Protocol):
    """Rows by their numbers, of which messages say where they come from."""

    def where(self, index: int) -> str:
        """The origin of a row, for messages."""
        ...


@dataclass(frozen=True, eq=False)
class Source:
    """Rows of one origin, under the name by which errors call it."""

    name: str
    data: datasets.Dataset | Sequence[Mapping[str, Any]]
    ignored: tuple[str, ...] = ()  # columns that are there and not read

    def __len__(self) -> int:
        return len(self.data)

    def rows_at(self, indices: Int64[np.ndarray, " n"]) -> list[dict[str, Any]]:
        """The rows at `indices`, with the columns of `FIELDS` that they have."""
        if isinstance(self.data, datasets.Dataset):
            with reading(f"{self.name}: rows cannot be read"):
                columns = self.data[indices.tolist()]
            return [
                dict(zip(columns, row, strict=True))
                for row in zip(*columns.values(), strict=True)
            ]
        rows = [self.data[i] for i in indices.tolist()]
        return [{k: row[k] for k in FIELDS if k in row} for row in rows]

    def update_hash(self, update: Callable[[Buffer], object]):
        """Gives the content of every row to a hash, at about the speed of the hash."""
        if not isinstance(self.data, datasets.Dataset):
            for row in self.data:
                fields = {k: row[k] for k in FIELDS if k in row}
                update(json.dumps(fields, sort_keys=True, default=repr).encode())
            return
        tables: Any = self.data.with_format("arrow").iter(_HASH_ROWS)
        for table in tables:
            # Arrow's stream format rebases slices: equal rows of equal types give equal
            # bytes.
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table.combine_chunks())
            update(sink.getvalue())


@dataclass(frozen=True, eq=False)
class PreferenceRows:
    """Rows of several sources, in the order of use.

    Row i is row indices[i] of the source numbered source_ids[i].
    """

    sources: tuple[Source, ...]
    source_ids: Int64[np.ndarray, " n"]
    indices: Int64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.indices)

    def where(self, index: int) -> str:
        """The origin of a row, for messages."""
        source = self.sources[int(self.source_ids[index])]
        return origin(source.name, int(self.indices[index]))

    def batches(self, size: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """(index of the first row, rows) for each `size` rows, in order."""
        for first in range(0, len(self), size):
            source_ids = self.source_ids[first : first + size]
            indices = self.indices[first : first + size]
            batch: list[dict[str, Any]] = [{} for _ in indices]
            for number in np.unique(source_ids).tolist():
                places = np.flatnonzero(source_ids == number)
                rows = self.sources[number].rows_at(indices[places])
                for place, row in zip(places.tolist(), rows, strict=True):
                    batch[place] = row
            yield first, batch

    def update_hash(self, update: Callable[[Buffer], object]):
        """Gives a hash what the rows hold and their order; names do not count."""
        for source in self.sources:
            source.update_hash(update)
        update(self.source_ids.tobytes())
        update(self.indices.tobytes())


def origin(source: str, index: int) -> str:
    """A row of a source, for messages."""
    return f"{source}, row {index} (counting from 0)"


def as_rows(data: Any) -> PreferenceRows:
    """Rows given from Python: a `datasets.Dataset`, or a list of dicts.

    Raises:
        InputError: something else, no rows, or rows without the needed columns.
    """
    if isinstance(data, PreferenceRows):
        return data
    if isinstance(data, datasets.Dataset):
        _warn_of_format(data)
        return one_after_another((checked_source("the data set", data),))
    if not isinstance(data, list | tuple):
        way_out = ""
        if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
            way_out = f": pick one of its splits ({', '.join(map(str, data))})"
        if isinstance(data, datasets.IterableDataset):
            way_out = "; only train_dataset may be one that is streamed"
        raise InputError(
            f"the data set is a {type(data).__name__}; give a datasets.Dataset or a "
            f"list of rows{way_out}"
        )
    for i, row in enumerate(data):
        if not isinstance(row, Mapping):
            raise InputError(
                f"the data set, row {i} (counting from 0), is a {type(row).__name__}; "
                "each row must be a dict with chosen, rejected and mostly prompt"
            )
    return one_after_another((checked_source("the data set", data),))


def one_after_another(sources: tuple[Source, ...]) -> PreferenceRows:
    """All rows of each source, in order."""
    sizes = [len(source) for source in sources]
    return PreferenceRows(
        sources=sources,
        source_ids=np.repeat(np.arange(len(sources)), sizes),
        indices=np.concatenate([np.arange(size) for size in sizes]),
    )


def checked_source(
    name: str, data: datasets.Dataset | Sequence[Mapping[str, Any]]
) -> Source:
    """A source with only the columns that we read.

    Raises:
        InputError: no rows, or columns that are of no form.
    """
    if len(data) == 0:
        raise InputError(f"{name} has no rows; give at least one preference pair")
    # Rows of a list may differ: each is looked at when it is tokenised.
    columns = getattr(data, "column_names", None) or list(map(str, data[0]))
    if isinstance(data, datasets.Dataset):
        answers = data.features.get("chosen")
        check_names(name, columns, not isinstance(answers, datasets.Value))
    elif not hasattr(data, "column_names"):  # else its reader has seen to it
        for i, row in enumerate(data):
            messages = isinstance(row.get("chosen"), list | tuple | Mapping)
            where = f"{name}, row {i} (counting from 0)"
            check_names(where, map(str, row), messages)
    check_columns(name, columns)
    if isinstance(data, datasets.Dataset):
        kept = [field for field in FIELDS if field in columns]
        data = data.with_format(None).select_columns(kept)
    ignored = tuple(column for column in columns if column not in FIELDS)
    return Source(name=name, data=data, ignored=ignored)


def check_columns(name: str, columns: Sequence[str]):
    """Refuses columns that are of no form; warns of those of a form that is not read.

    Raises:
        InputError: naming the column that is not there.
    """
    form = form_of(columns)
    if form is None:
        field = "rejected" if "chosen" in columns else "chosen"
        raise InputError(
            f"{name} has no column {field!r}{did_you_mean(field, columns)}; it "
            f"has {', '.join(columns)}, and needs chosen, rejected and "
            "(unless both start with it) prompt: rename its columns, or say what they "
            "are called in the run file (columns)"
        )
    read = {*form.needs, *form.may_have, *OF_ANY_FORM}
    unread = [x for other in FORMS for x in other.needs if x not in read]
    unread = [x for x in dict.fromkeys(unread) if x in columns]
    if unread:
        logger.warning(
            "%s: the columns %s are not read, since %s are, which is enough",
            name,
            ", ".join(unread),
            ", ".join(x for x in (*form.needs, *form.may_have) if x in columns),
        )


def _warn_of_format(data: datasets.Dataset):
    """Says that `with_transform` and the like are not applied to what is read."""
    kind = data.format["type"]
    if kind == "custom":
        logger.warning(
            "the data set's transform (with_transform or set_transform) is not applied "
            "to its %d rows; apply it with map() instead",
            len(data),
        )
    elif kind is not None or list(data.format["columns"]) != data.column_names:
        logger.warning(
            "the data set's format (%s, columns %s) is not used: its %d rows are read "
            "as Python values, from all columns; leave out set_format or with_format",
            kind or "python",
            ", ".join(data.format["columns"]),
            len(data),
        )
