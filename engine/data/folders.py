"""What a folder or a hub id holds: its files by split, and which of them are not read.

`datasets` decides over splits, and only that: no file of a data set is ever run, and
nothing is asked on the terminal.
"""

import contextlib
import glob
import logging
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets
from huggingface_hub.utils import logging as hub_logging

from engine.data.stages import reading
from engine.data.text_files import data_ending
from engine.errors import InputError
from engine.paths import is_url

logger = logging.getLogger(__name__)

# "cache": a hub's data set that `datasets` has kept, while there is no connection.
_KINDS = ("json", "csv", "parquet", "arrow", "cache")
_DATA_ENDINGS = {".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow"}
_FACTS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# Options in a data card under which a file means something else than it says.
_READ_OTHERWISE = {"json": ("field",), "csv": ("names", "column_names", "skiprows")}


class Found(NamedTuple):
    """The data files of a folder or hub id."""

    kind: str
    splits: dict[str, list[str]]  # paths and URLs
    delimiter: str | None  # between the cells of a CSV file, if it is told

    def files(self) -> list[str]:
        """Of all splits."""
        return [file for files in self.splits.values() for file in files]

    @property
    def readable(self) -> bool:
        """Whether we read the files, instead of `datasets` for us."""
        if self.kind in ("json", "csv"):
            return True
        return self.kind != "cache" and not any(map(is_url, self.files()))


def find(
    path: str, subset: str | None, cache_dir: str | None
) -> Found | dict[str, datasets.Dataset]:
    """The files behind a hub id or a folder; the data itself, if `save_to_disk` did it.

    Args:
        subset: the hub's name for one of several data sets in one place.
    Raises:
        InputError: no data, a kind that is not read, or a loading script.
    """
    if os.path.isfile(path):
        raise InputError(
            f"{path} is a file whose name does not tell its type; set type to json, "
            "csv, parquet or arrow (plain text has no chosen and rejected)"
        )
    if glob.has_magic(path) and not os.path.exists(path):
        raise InputError(
            f"{path} is a pattern that does not tell the type of its files; set type "
            "to json, csv, parquet or arrow"
        )
    names = os.listdir(path) if os.path.isdir(path) else []
    if "dataset_dict.json" in names or "state.json" in names:
        with reading(f"{path} cannot be read as hf"):
            saved = datasets.load_from_disk(path)
        if isinstance(saved, datasets.Dataset):
            return {str(saved.split or "train"): saved}
        return {str(split): data for split, data in saved.items()}
    if not names and (os.path.isabs(path) or path.startswith((".", "~"))):
        raise InputError(f"{path} is not a folder with data in it")
    script = f"{os.path.basename(os.path.normpath(path))}.py"
    if script in names:
        raise InputError(
            f"{path} has a loading script, {script}, and none is ever run; name its "
            "data files in data_files, with their type"
        )
    what = "hf" if os.path.isdir(path) else "a hub id, and is no folder here"
    with reading(f"{path} cannot be read as {what}"), _asking(path, what):
        builder = datasets.load_dataset_builder(
            # By its whole path, as `json` alone names one of the library's readers.
            os.path.abspath(path) if names else path,
            name=subset,
            cache_dir=cache_dir,
        )
    found = _found(path, str(builder.name), builder.config)
    if not names and not all(map(is_url, found.files())):
        raise InputError(f"{path} is no folder here, and no hub id; name files or one")
    if names and subset is None:
        _warn_of_the_rest(path, found)
    return found


@contextlib.contextmanager
def _asking(path: str, what: str) -> Iterator[None]:
    """One line before a hub is asked, in place of its library's for every new try.

    It tries for half a minute where there is no network.
    """
    if what == "hf":
        yield
        return
    logger.info("asking the hub for %s ...", path)
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)


def _found(path: str, kind: str, config: Any) -> Found:
    if kind not in _KINDS:
        raise InputError(
            f"{path} holds {kind} files; json, csv, parquet and arrow are read"
        )
    for option in _READ_OTHERWISE.get(kind, ()):
        if getattr(config, option, None) is not None:
            raise InputError(
                f"{path}: its data card sets {option!r} for {kind} files, which is not "
                "supported; name its files in data_files"
            )
    splits = {
        str(key): [file for file in files if _is_data(file)]
        for key, files in (config.data_files or {}).items()
    }
    splits = {key: files for key, files in splits.items() if files}
    if config.data_files and not splits:
        raise InputError(
            f"{path} holds no data file: the last ending of a name must be one of "
            f"{', '.join(sorted(_DATA_ENDINGS))}, or of a compression after it"
        )
    delimiter = getattr(config, "sep", None) if kind == "csv" else None
    return Found(kind, splits, delimiter)


def _is_data(file: str) -> bool:
    """Whether a name does not say that it is put away, as a.jsonl.bak does."""
    suffixes = set(os.path.basename(file).split(".")[1:-1])
    known = data_ending(file) in _DATA_ENDINGS
    return known or not any(f".{suffix}" in _DATA_ENDINGS for suffix in suffixes)


def _warn_of_the_rest(path: str, found: Found):
    """Says which data files of a folder belong to no split, as they are not read."""
    used = {os.path.realpath(file) for file in found.files()}
    unread = []
    for folder, _, names in os.walk(path):
        for name in sorted(names):
            stem, ending = os.path.splitext(name)
            ending = ending if ending in _DATA_ENDINGS else os.path.splitext(stem)[1]
            file = os.path.join(folder, name)
            if name.startswith(".") or name in _FACTS or ending not in _DATA_ENDINGS:
                continue
            if os.path.realpath(file) not in used:
                unread.append(os.path.relpath(file, path))
    if unread:
        logger.warning(
            "%s: %d of its %d data files are not read, the first %s: only its %s files "
            "are, those that belong to a split; name the others in an entry of their "
            "own in informs",
            path,
            len(unread),
            len(unread) + len(used),
            unread[0],
            found.kind,
        )
