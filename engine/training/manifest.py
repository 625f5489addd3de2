"""A checkpoint's list of files: their sizes and checksums, and one of its own."""

import json
import zlib
from collections.abc import Collection
from pathlib import Path

MANIFEST = "manifest.json"
_BLOCK = 2**22


class Damaged(Exception):
    """A checkpoint that is not what was written, in words."""


def manifest(directory: Path) -> str:
    """The text of the list of every file that is there."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    listed = {path.relative_to(directory).as_posix(): _measure(path) for path in files}
    text = json.dumps({"files": listed})
    return f"{text}\n{zlib.crc32(text.encode()):08x}\n"


def check(directory: Path, read: Collection[str] | None = None) -> None:
    """That every file is as it was written.

    Args:
        read: files whose contents are looked into, not their sizes alone; None: all.
    Raises:
        Damaged: naming the file.
    """
    for name, (size, checksum) in _read(directory / MANIFEST).items():
        file = directory / name
        try:
            found = file.stat().st_size
            if found != size:
                raise Damaged(f"{name} has {found} bytes, and had {size}")
            if (read is None or name in read) and _checksum(file) != checksum:
                raise Damaged(f"{name} has other contents than were written")
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from error


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _measure(path: Path) -> tuple[int, int]:
    return path.stat().st_size, _checksum(path)


def _read(path: Path) -> dict[str, tuple[int, int]]:
    try:
        text, checksum, end = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read ({error.strerror})") from error
    except ValueError:  # other lines, or no text at all
        raise Damaged(f"{path.name} has other contents than were written") from None
    if end or checksum != f"{zlib.crc32(text.encode()):08x}":
        raise Damaged(f"{path.name} has other contents than were written")
    return {
        name: (size, crc) for name, (size, crc) in json.loads(text)["files"].items()
    }
