"""CSV files, and other text, read to the letter: a cell is the text that is there.

Nothing is guessed: a row that does not fit the header, bytes that are not UTF-8 and
broken JSON are refused by file and line, where inferring readers shift columns, fill in
empty text, or turn what looks like a date into a timestamp.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, overload

import pyarrow as pa

from engine.data.columns import FIELDS, Renamed, check_names
from engine.errors import InputError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_BAD_ARCHIVE = (OSError, EOFError, zlib.error, lzma.LZMAError)
_LOOKS_LIKE = {
    b"\xff\xfe": ", it looks like UTF-16",
    b"\xfe\xff": ", it looks like UTF-16",
    b"\x1f\x8b": ", it looks like an archive whose name should end in .gz",
}
_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars (|)"}
_BINARY = {
    b"PAR1": "a Parquet file; set type to parquet",
    b"ARROW1": "an Arrow file; set type to arrow",
    b"PK\x03\x04": (
        "a zip archive, or an Excel workbook; unpack it, or save the sheet as CSV"
    ),
}
AS_NAMED = Renamed()
_NAMED = 3  # cells of a bad row that an error shows
_SHOWN = 40  # characters of a cell that it shows


def data_ending(file: str) -> str:
    """A file name's ending, without that of its compression."""
    stem, ending = os.path.splitext(file)
    return os.path.splitext(stem)[1] if ending in COMPRESSED else ending


class PackedRows(Sequence[Mapping[str, Any]]):
    """Rows in memory as JSON text, unpacked when read: about the size of the file."""

    def __init__(self, packed: list[str], columns: tuple[str, ...]):
        self._packed = packed
        self.column_names = columns  # of the files: those that no row needs, too

    @classmethod
    def of(
        cls, rows: Iterable[tuple[Mapping[str, Any], Iterable[str]]]
    ) -> "PackedRows":
        """The rows' needed fields; with each row come all its columns' names."""
        packed, columns = [], {}
        for row, names in rows:
            columns |= dict.fromkeys(names)
            fields = {key: row[key] for key in FIELDS if key in row}
            packed.append(json.dumps(fields, sort_keys=True, ensure_ascii=False))
        return cls(packed, tuple(columns))

    def __len__(self) -> int:
        return len(self._packed)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> "PackedRows": ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return PackedRows(self._packed[index], self.column_names)
        return json.loads(self._packed[index])

    def joined(self, other: "PackedRows") -> "PackedRows":
        """These rows, then the other ones."""
        columns = dict.fromkeys((*self.column_names, *other.column_names))
        return PackedRows(self._packed + other._packed, tuple(columns))


def read_csv(
    path: str, name: str, delimiter: str = ",", renamed: Renamed = AS_NAMED
) -> PackedRows:
    """The rows of `csv_rows`, all of them.

    Raises:
        InputError: as `csv_rows`.
    """
    return PackedRows.of((row, row) for row in csv_rows(path, name, delimiter, renamed))


def csv_rows(
    path: str, name: str, delimiter: str = ",", renamed: Renamed = AS_NAMED
) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file, one at a time, under the columns its first row names.

    Raises:
        InputError: a row of another width than the header, a quote that is not closed,
            a column named twice, or what `text_lines` refuses; it names the line.
    """
    header: list[str] | None = None
    for line, cells in _records(_csv_lines(path, name, delimiter), name, delimiter):
        if header is None:
            header = cells
            _check_header(name, line, header, delimiter, renamed)
        elif len(cells) != len(header):
            raise InputError(_another_width(name, line, cells, header))
        else:
            yield renamed.row(dict(zip(header, cells, strict=True)))
    if header is None:
        raise InputError(f"{name} is empty; give at least one preference pair")


def read_text(path: str, name: str) -> str:
    """The text of a whole file: the lines of `text_lines`.

    Raises:
        InputError: as `text_lines`.
    """
    return "".join(text_lines(path, name))


def text_lines(path: str, name: str) -> Iterator[str]:
    """The lines of a UTF-8 file, unpacked by its ending, without a byte-order mark.

    A line ends with a line feed, and only there. No more than one is held.

    Raises:
        InputError: a damaged archive, or bytes that are not UTF-8, by line and byte.
    """
    start = b""  # of the file
    for line, data in enumerate(_unpacked(path, name), 1):
        mark = 0
        if line == 1:
            start = data[:8]
            for magic, what in _BINARY.items():
                if data.startswith(magic):
                    raise InputError(f"{name} is no text: it is {what}")
            mark = 3 if data.startswith(b"\xef\xbb\xbf") else 0
        try:
            text = data[mark:].decode()
        except UnicodeDecodeError as error:
            # Places count from the start of the file, which the mark is part of.
            at = error.start + mark
            like = _LOOKS_LIKE.get(start[:2], "")
            raise InputError(
                f"{name}, line {line}, byte {at + 1}, is not UTF-8 text "
                f"(0x{data[at]:02x}{like}); save the file as UTF-8"
            ) from None
        if "\0" in text:
            like = ", it looks like UTF-16" if start[:4].count(0) == 2 else ""
            raise InputError(
                f"{name}, line {line}, has a NUL character (0x00{like}); save the file "
                "as UTF-8, without it"
            )
        yield text


def _unpacked(path: str, name: str) -> Iterator[bytes]:
    """The lines of a file, or of the one that is packed in it."""
    ending = os.path.splitext(path)[1]
    try:
        with _opened(path, ending) as file:
            yield from file
    except _BAD_ARCHIVE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if ending in COMPRESSED:
            reason = f"it is no sound {ending} archive ({reason}); pack it again"
        raise InputError(f"{name} cannot be read: {reason}") from error


def _opened(path: str, ending: str) -> Any:
    if ending == ".zst":
        packed: Any = pa.input_stream(path, compression="zstd")
        return io.BufferedReader(packed)
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(ending, open)(path, "rb")


@contextmanager
def _any_length_of_cell() -> Iterator[None]:
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _csv_lines(path: str, name: str, delimiter: str) -> Iterator[str]:
    """The lines of a file, which may end with a carriage return as well."""
    for number, line in enumerate(text_lines(path, name), 1):
        _check_quotes(line, number, name, delimiter)
        yield from io.StringIO(line, newline="")


def _records(
    lines: Iterator[str], name: str, delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    """(line of the file, cells) of each row that is not empty."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1  # a quoted cell may hold lines of its own
        try:
            with _any_length_of_cell():
                cells = next(reader, None)
        except csv.Error as error:
            reason = str(error)
            if "unexpected end of data" in reason:
                reason = "a quoted cell that begins in this row is never closed"
            raise InputError(
                f"{name}, line {line}: {reason}; put a cell that holds a quote in "
                'double quotes, and write each quote in it twice ("")'
            ) from None
        if cells is None:
            return
        if cells:
            yield line, cells


def _check_quotes(line: str, number: int, name: str, delimiter: str):
    """Refuses quotes that a space comes before, as they would not quote the cell."""
    # Within a quoted cell each quote is doubled, or the last of the cell.
    mark = re.escape(delimiter)
    if re.search(rf'(?:^|{mark}) +"(?!"|{mark}|\r|\n|\Z)', line):
        raise InputError(
            f"{name}, line {number}: a cell has a space before its double quote, which "
            "then does not quote it; remove the space"
        )


def _check_header(
    name: str, line: int, header: list[str], delimiter: str, renamed: Renamed
):
    for other, called in _SEPARATORS.items():
        cells = [cell.strip(' "') for cell in delimiter.join(header).split(other)]
        if other != delimiter and {"chosen", "rejected"} <= set(cells) - set(header):
            raise InputError(
                f"{name}, line {line}: cells are separated by {called}, but are read "
                f"as separated by {_SEPARATORS.get(delimiter, repr(delimiter))}; save "
                "it with commas as .csv, or with tabs as .tsv"
            )
    renamed.check(f"{name}, line {line},", header)
    check_names(f"{name}, line {line}", renamed.row(dict.fromkeys(header)))
    for cell in header:
        if cell and header.count(cell) > 1:
            raise InputError(
                f"{name}, line {line}: the column {cell!r} is named twice in the "
                "header; give each column a name of its own"
            )


def _another_width(name: str, line: int, cells: list[str], header: list[str]) -> str:
    shown = [c if len(c) <= _SHOWN else f"{c[:_SHOWN]}..." for c in cells[:_NAMED]]
    found = ", ".join(map(repr, shown)) + ", ..." * (len(cells) > _NAMED)
    way_out = "fill in the missing ones"
    if len(cells) > len(header):
        way_out = 'put a cell that holds a comma in double quotes: "Well, yes"'
        if not any(cells[len(header) :]):
            way_out = "remove the commas at its end"
    return (
        f"{name}, line {line}: {len(cells)} {'cell' if len(cells) == 1 else 'cells'} "
        f"({found}) under a header of {len(header)} ({', '.join(header)}); {way_out}"
    )
