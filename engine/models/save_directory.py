"""Where a trained model goes: what may be replaced there, and how that is done."""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from engine.errors import InputError, library_errors, one_line
from engine.models.checkpoint import (
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    is_tokenizer_file,
    listed,
)
from engine.paths import as_path, is_url, matching_files

# In the header of every weight file, beside transformers' `format`: who wrote it, and
# the names of all that was written with it. Nothing else is ever replaced or removed.
WRITER, FILES = "writer", "files"
OUR_NAME = "dpo-engine"
GENERATION = "generation_config.json"
_MEANT = (CONFIG, INDEX, ADAPTER_CONFIG, GENERATION)

_WAY_OUT = "give another save_directory"
_STAGING = ".model.part"
_MARK = ".dpo-engine"  # in it, while it is being written: it is ours to remove
_WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors")
_OLD_PARTS = re.compile(r"\.(model.*\.safetensors(\.index\.json)?|config\.json)\.part")


def check_save_directory(
    directory: str | Path,
    sources: Mapping[str, str | Path | None],
    data: Mapping[str, Iterable[str]] | None = None,
) -> Path:
    """The directory, `~` expanded, if a model may be saved there; makes nothing.

    Args:
        sources: what the run reads, by the name of its option; None and hub ids are
            passed over.
        data: likewise, of data: files, patterns or folders.
    Raises:
        InputError: it is a source's own directory, the data's or one that holds it, a
            file, not to be written to, or has a model or a tokenizer that no earlier
            save put there.
    """
    shown = f"save_directory={str(directory)!r}"
    with library_errors(
        lambda error: f"{shown} cannot be used ({one_line(error)}); {_WAY_OUT}"
    ):
        directory = as_path(directory)
        if ".." in directory.parts:
            # Of `nodir/../model` nothing exists until nodir is made, and then all.
            directory = Path(os.path.realpath(directory))
        _check_place(directory, shown)
        for option, source in sources.items():
            if source is not None and _same(as_path(source), directory):
                raise InputError(
                    f"{shown} is the directory of {option}={str(source)!r}, which the "
                    f"trained model would replace; {_WAY_OUT}"
                )
        for option, paths in (data or {}).items():
            _check_data(directory, shown, option, paths)
        if directory.is_dir():
            earlier_save(directory)
    return directory


def _same(source: Path, directory: Path) -> bool:
    """Whether both are one directory, however they are spelt."""
    source = Path(os.path.realpath(source))
    return source.is_dir() and directory.exists() and source.samefile(directory)


def _check_data(directory: Path, shown: str, option: str, paths: Iterable[str]) -> None:
    """Refuses a directory in which what is saved would lie among the data.

    A pattern such as *.jsonl would take the metrics for data in the next run.
    """
    for path in paths:
        for name in () if is_url(path) else matching_files(path):
            found = Path(os.path.realpath(name))
            folder = found if found.is_dir() else found.parent
            if any(_same(above, directory) for above in (folder, *folder.parents)):
                raise InputError(
                    f"{shown} is, or holds, the folder of {option}={path!r}; what is "
                    f"saved would lie among the data; {_WAY_OUT}"
                )


def _check_place(directory: Path, shown: str) -> None:
    """Whether there is, or can be made, a directory to write into."""
    if "\0" in str(directory):
        raise InputError(f"{shown} has a NUL character, which no path has; {_WAY_OUT}")
    if directory.is_symlink() and not directory.exists():
        raise InputError(f"{shown} is a link to nothing; {_WAY_OUT}")
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{shown} is a file; {_WAY_OUT}")
    parent = directory.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(
            f"{shown} cannot be made, as {str(parent)!r} is a file; {_WAY_OUT}"
        )
    try:
        _try_to_write(parent)
    except OSError as error:
        raise InputError(
            f"{shown} cannot be written: {one_line(error)}; {_WAY_OUT}"
        ) from error
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(
            f"{shown} cannot be written: no permission in {str(parent)!r}; {_WAY_OUT}"
        )


def _try_to_write(folder: Path) -> None:
    """Makes a file without a name, or where there is no such thing, one for a moment.

    (`os.access` knows of permissions alone, which root has in /proc too.)
    """
    if hasattr(os, "O_TMPFILE"):
        try:
            os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600))
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
    with tempfile.TemporaryFile(dir=folder, prefix=".dpo-"):
        pass


def _is_our_staging(path: Path) -> bool:
    """Whether a save of this program was at work there and did not end."""
    return path.is_dir() and not path.is_symlink() and (path / _MARK).is_file()


def _survey(directory: Path) -> tuple[frozenset[str], list[str]]:
    """Names of what an earlier save wrote, and of what others put where one writes."""
    ours: set[str] = set()
    foreign = []
    for path in sorted(directory.iterdir()):
        if _WEIGHTS.fullmatch(path.name):
            names = _written_with(path)
            ours |= {path.name, *names} if names else set()
            foreign += [] if names else [path.name]
    for path in sorted(directory.iterdir()):
        meant = path.name in _MEANT or is_tokenizer_file(path.name)
        if meant and path.name not in ours:
            foreign.append(path.name)
    return frozenset(ours), foreign


def earlier_save(directory: Path) -> frozenset[str]:
    """Names of what an earlier save wrote into a directory.

    Raises:
        InputError: there is a model or a tokenizer that is not from one.
    """
    ours, foreign = _survey(directory)
    staging = directory / _STAGING
    if os.path.lexists(staging) and not _is_our_staging(staging):
        foreign.append(_STAGING)
    if foreign:
        raise InputError(
            f"save_directory={str(directory)!r} has {listed(foreign)}, which this "
            "program did not write there and does not replace; give another "
            "save_directory, or move what is there"
        )
    return ours


def _written_with(path: Path) -> set[str]:
    """The names in the header of a weight file of ours; none in any other file's."""
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return set()
    if metadata.get(WRITER) != OUR_NAME:
        return set()
    names = json.loads(metadata[FILES])
    return {name for name in names if not re.search(r"^/|(^|/)\.\.?(/|$)", name)}


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A directory to write a model into, which then takes the place of an earlier one.

    What is written has reached the disk before anything in `directory` changes; then
    each file is renamed into place, and what only the earlier save had is removed. If
    writing fails, `directory` is as it was.

    Raises:
        InputError: `check_save_directory`'s reasons; the disk is full or fails.
    """
    check_save_directory(directory, {})
    staging = directory / _STAGING
    made = False
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory)
        staging.mkdir()
        made = True
        (staging / _MARK).touch()
        yield staging
        written = files_in(staging)
        for name in written:
            _flush(staging / name)
        (staging / _MARK).unlink()  # whole: what cannot be published is kept
    except BaseException as error:
        if made:
            shutil.rmtree(staging, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise InputError(
            f"{directory}: the model could not be saved ({one_line(error)}); what was "
            "there before is as it was; free some space, or give another save_directory"
        ) from error
    _publish(staging, directory, written)


def _publish(staging: Path, directory: Path, written: list[str]) -> None:
    """Renames what was written into place, the weights first, and removes the old."""
    earlier, foreign = _survey(directory)
    foreign += [n for n in written if (directory / n).exists() and n not in earlier]
    if foreign:
        names = listed(dict.fromkeys(foreign))
        raise InputError(
            f"{directory}: has {names}, which this program did not write there and "
            f"does not replace; the new model is whole in {staging}: move it elsewhere"
        )
    try:
        for name in sorted(written, key=lambda name: not _WEIGHTS.fullmatch(name)):
            (directory / name).parent.mkdir(exist_ok=True)
            os.replace(staging / name, directory / name)
        for name in earlier - set(written):
            if not (directory / name).is_dir():
                (directory / name).unlink(missing_ok=True)
        shutil.rmtree(staging)
        _flush(directory)
    except OSError as error:
        raise InputError(
            f"{directory}: the model could not be put in its place "
            f"({one_line(error)}); what is not there yet is in {staging}"
        ) from error


def _remove_leftovers(directory: Path) -> None:
    """What an interrupted save has left; earlier versions left single files."""
    if _is_our_staging(directory / _STAGING):
        shutil.rmtree(directory / _STAGING)
    for path in directory.iterdir():
        if _OLD_PARTS.fullmatch(path.name) and path.is_file():
            path.unlink()


def files_in(folder: Path) -> list[str]:
    """Names of the files below the folder of a new save, without its mark."""
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != _MARK)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
