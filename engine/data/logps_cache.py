"""The reference's log-probabilities of a data set on disk, written piece by piece.

A folder belongs to one data set and one way of scoring it. Each of its files holds some
pairs and their values, is written whole or not at all, and says what it belongs to.
"""

import logging
import os
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int64

from engine.data.cache import default_cache_dir
from engine.errors import one_line
from engine.parallel import processes

logger = logging.getLogger(__name__)

SECONDS = 15.0  # between two pieces: as much work a kill may cost
_FORMAT = "reference-logps-1"
_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class Belongs(NamedTuple):
    """What values are of: hashes."""

    data: str  # of the tokens, and which of them are scored
    reference: str  # of the weights, the dtype, and how they are summed


class StoredLogps:
    """Values of each pair, chosen and rejected; NaN where they are not known yet.

    Of several processes the first one reads, for all, and writes.
    """

    def __init__(self, belongs: Belongs, num_pairs: int):
        self._belongs = belongs
        root = default_cache_dir() / "reference" / belongs.data
        self.folder = root / belongs.reference
        self.values = np.full((num_pairs, 2), np.nan, np.float32)
        self._new: list[int] = []
        self._written = time.perf_counter()
        if processes.is_first():
            self._read()
        self.values = processes.of_first(self.values)
        # Under which other references the data is known: to say so, not to use it.
        try:
            others = [x for x in root.iterdir() if x != self.folder]
        except OSError:
            others = []
        self.has_others = bool(others)

    @property
    def missing(self) -> Bool[np.ndarray, " pairs"]:
        """Whether a pair's values are not known."""
        return np.isnan(self.values).any(axis=1)

    def add(
        self, pairs: Int64[np.ndarray, " n"], values: Float32[np.ndarray, "n 2"]
    ) -> None:
        """Keeps the values of some pairs; they are on disk within `SECONDS`."""
        self.values[pairs] = values
        self._new += pairs.tolist()
        if time.perf_counter() - self._written >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what is new."""
        if self._new:
            new, self._new = np.array(sorted(set(self._new))), []
            self._write(new)
        self._written = time.perf_counter()

    def finish(self) -> None:
        """Writes all values in one file, and removes the pieces."""
        assert not self.missing.any()
        self._new = []
        if not processes.is_first():
            return
        pieces = self._pieces()
        whole = self._write(np.arange(len(self.values)))
        for piece in pieces if whole else ():
            piece.unlink(missing_ok=True)

    def _pieces(self) -> list[Path]:
        return sorted(self.folder.glob("*.npz"))

    def _read(self) -> None:
        for path in self._pieces():
            try:
                # Opened here: numpy leaves open what is no archive.
                with (
                    open(path, "rb") as stream,
                    np.load(stream, allow_pickle=False) as file,
                ):
                    found = tuple(str(x) for x in file["belongs"])
                    pairs, values = file["pairs"], file["values"]
                self._check(found, pairs, values)
            except FileNotFoundError:  # another run has put it into its whole file
                continue
            except _DAMAGED as error:
                logger.warning(
                    "%s is damaged (%s) and not used; its pairs are scored again",
                    path,
                    one_line(error),
                )
                continue
            self.values[pairs] = values

    def _check(
        self, found: tuple[str, ...], pairs: np.ndarray, values: np.ndarray
    ) -> None:
        if found != (_FORMAT, *self._belongs):
            raise ValueError("it belongs to other data or another reference")
        sound = (
            pairs.dtype.kind == "i"
            and values.shape == (*pairs.shape, 2)
            and values.dtype == np.float32
            and bool(np.isfinite(values).all())
            and 0 <= pairs.min(initial=0) <= pairs.max(initial=0) < len(self.values)
        )
        if not sound:
            raise ValueError("its parts do not fit together")

    def _write(self, pairs: Int64[np.ndarray, " n"]) -> bool:
        """Whether the folder took a file of these pairs."""
        if not processes.is_first():
            return True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                dir=self.folder, prefix="pairs-", suffix=".tmp", delete=False
            ) as file:
                try:
                    np.savez(
                        file,
                        belongs=np.array([_FORMAT, *self._belongs]),
                        pairs=pairs,
                        values=self.values[pairs],
                    )
                    file.flush()
                    os.replace(file.name, Path(file.name).with_suffix(".npz"))
                finally:
                    Path(file.name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning(
                "the reference's log-probabilities are not kept in %s: %s",
                self.folder,
                error,
            )
            return False
        return True
