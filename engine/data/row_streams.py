"""Preference rows that are read as they are needed, again and again, and not kept."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import datasets
import numpy as np

from engine.config.streaming import BUFFER
from engine.data.columns import FIELDS, Renamed, check_names
from engine.data.rows import (
    PreferenceRows,
    Source,
    as_rows,
    check_columns,
    origin,
)
from engine.data.stages import reading
from engine.errors import InputError

CHUNK = 128  # rows read, and tokenised, at a time


class Place(NamedTuple):
    """Where a row comes from."""

    source: int
    row: int  # of its source


@dataclass(frozen=True, eq=False)
class StreamedSource:
    """Rows of one origin, under the name by which errors call it."""

    name: str
    # All rows from the first on, under the names that are read; passes count from 0.
    rows: Callable[[int], Iterator[Mapping[str, Any]]]
    # Looks at the columns of the first row.
    check: Callable[[list[str]], None] = lambda columns: None


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some rows of a stream; row `first + i` of a pass is rows[i]."""

    stream: "RowStream"
    first: int
    rows: list[dict[str, Any]]
    places: list[Place]

    def where(self, index: int) -> str:
        """The origin of a row, for messages."""
        source, row = self.places[index - self.first]
        return origin(self.stream.sources[source].name, row)

    def ignored(self, index: int) -> tuple[str, ...]:
        """The columns beside a row that are not read."""
        return self.stream.ignored[self.places[index - self.first].source]


@dataclass(frozen=True, eq=False, kw_only=True)
class RowStream:
    """Rows of several sources; each pass reads the same ones, in the same order.

    With weights the source of each row is drawn at random (`seed`) with these
    probabilities, and a pass ends where the one that is drawn has no more rows; else it
    is all rows, one source after another.
    """

    sources: tuple[StreamedSource, ...]
    weights: tuple[float, ...] | None = None
    seed: int = 0
    shuffle_buffer_size: int | None = None  # as it was given
    # By the number of a source, once its first row was read.
    ignored: dict[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def buffer(self) -> int:
        """Pairs among which the next one is drawn; 1: they keep their order."""
        size = self.shuffle_buffer_size
        return BUFFER if size is None else max(1, size)

    @property
    def name(self) -> str:
        """Of all sources."""
        return ", ".join(source.name for source in self.sources)

    def rows(self, number: int) -> Iterator[tuple[Place, dict[str, Any]]]:
        """Every row of a pass (0, 1, ...).

        Raises:
            InputError: what cannot be read, or has no columns of a pair.
        """
        readers = [
            enumerate(self._checked(i, source.rows(number)))
            for i, source in enumerate(self.sources)
        ]
        for source in self._order():
            found = next(readers[source], None)
            if found is None and self.weights is not None:
                return
            while found is not None:
                index, row = found
                yield Place(source, index), row
                found = None if self.weights else next(readers[source], None)

    def _order(self) -> Iterator[int]:
        """The sources, in turn; with weights one for each row, without end."""
        if self.weights is None:
            yield from range(len(self.sources))
            return
        rng = np.random.default_rng(self.seed)
        bounds = np.cumsum(self.weights)
        while True:
            drawn = rng.random(CHUNK) * bounds[-1]
            found = np.searchsorted(bounds, drawn, side="right")
            yield from np.minimum(found, len(bounds) - 1).tolist()

    def _checked(
        self, number: int, rows: Iterator[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        source, empty = self.sources[number], True
        for row in rows:
            if number not in self.ignored:
                columns = list(map(str, row))
                source.check(columns)
                check_columns(source.name, columns)
                self.ignored[number] = tuple(x for x in columns if x not in FIELDS)
            empty = False
            yield {k: row[k] for k in FIELDS if k in row}
        if empty:
            again = ""
            if number in self.ignored:
                again = (
                    " when it is read again; give one that can be read more than once, "
                    "or fewer max_training_steps"
                )
            raise InputError(
                f"{source.name} has no rows{again or '; give at least one pair'}"
            )

    def chunks(self, number: int) -> Iterator[Chunk]:
        """The rows of a pass, some at a time."""
        rows, first = self.rows(number), 0
        while some := list(itertools.islice(rows, CHUNK)):
            places, found = zip(*some, strict=True)
            yield Chunk(self, first, list(found), list(places))
            first += len(some)

    def first(self, number: int) -> PreferenceRows:
        """The first rows, at most so many, as rows that are held."""
        some = list(itertools.islice(self.rows(0), number))
        held: list[list[dict[str, Any]]] = [[] for _ in self.sources]
        for (source, _), row in some:
            held[source].append(row)
        places = np.array([place for place, _ in some], np.int64).reshape(-1, 2)
        return PreferenceRows(
            sources=tuple(
                Source(source.name, data, self.ignored.get(i, ()))
                for i, (source, data) in enumerate(zip(self.sources, held, strict=True))
            ),
            source_ids=places[:, 0],
            indices=places[:, 1],
        )


def library_rows(
    name: str, data: Iterable[Mapping[str, Any]], renamed: Renamed
) -> Iterator[dict[str, Any]]:
    """The rows that a library reads, under the names that are read.

    Raises:
        InputError: what the library cannot read; columns that are not there, or that
            are surely another one's.
    """
    number = 0
    with reading(f"{name} cannot be read"):
        rows = iter(data)
    while True:
        with reading(f"{name} cannot be read, from row {number} (counting from 0) on"):
            some = list(itertools.islice(rows, CHUNK))
        if not some:
            return
        for row in some:
            where = origin(name, number)
            if number == 0:
                renamed.check(name, row)
            found = renamed.row(row)
            messages = isinstance(found.get("chosen"), list | tuple | Mapping)
            check_names(where, found, messages)
            yield found
            number += 1


def is_stream(data: Any) -> bool:
    """Whether data is read while it is trained on."""
    return isinstance(data, RowStream | datasets.IterableDataset)


def stream_rows(data: Any, shuffle_buffer_size: int | None = None) -> RowStream:
    """A `datasets.IterableDataset` as `DPOTrainer` takes it for train_dataset.

    Args:
        shuffle_buffer_size: pairs among which the next one is drawn. None: 1000; 0 or
            1: the rows' own order.
    Raises:
        InputError: something else.
    """
    if isinstance(data, RowStream):
        return data
    if not isinstance(data, datasets.IterableDataset):
        as_rows(data)  # which knows what else it may be
        raise InputError(
            f"a {type(data).__name__} is not streamed; give a datasets.IterableDataset"
        )

    def rows(number: int) -> Iterator[Mapping[str, Any]]:
        with reading(f"{name} cannot be read"):
            plain = data.with_format(None)
            plain.set_epoch(number)  # of its own shuffling, where it has some
        return library_rows(name, plain, Renamed())

    name = "the data set"
    return RowStream(
        sources=(StreamedSource(name, rows),), shuffle_buffer_size=shuffle_buffer_size
    )
