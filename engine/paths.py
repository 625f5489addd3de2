"""The one reading of every path that a user gives."""

import glob
import os
from pathlib import Path


def expand(path: str | os.PathLike[str]) -> str:
    """`path` with a leading `~` or `~user` as that home directory.

    Hub ids, URLs and what begins otherwise come back as they are; so do `~name`s of
    users that this machine does not have, which may be files.
    """
    return os.path.expanduser(os.fspath(path))


def as_path(path: str | os.PathLike[str]) -> Path:
    """`expand`, as a `Path`."""
    return Path(expand(path))


def is_url(path: str) -> bool:
    """Whether `path` is an address (`https://...`, `hf://...`), not a local path."""
    return "://" in path


def matching_files(path: str | os.PathLike[str]) -> list[str]:
    """The file or folder of exactly that name, else what the pattern matches, sorted.

    So `run[7].jsonl` is the file of that name where it exists, although the pattern
    means run7.jsonl.
    """
    name = expand(path)
    return [name] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
