"""Arrays that sections pass on as files. Imports neither JAX nor torch.

bfloat16 travels as uint16: numpy has no name for it.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np

from bench.device.plan import Shape

SPACE = 40 * 2**30  # bytes that the shapes with a truth take, and some more


def directory() -> Path:
    """A new one, in memory where there is room: files of gigabytes are read at once."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > SPACE
    return Path(tempfile.mkdtemp(prefix="bench-gpu-", dir=memory if roomy else None))


def path(work: Path, shape: Shape, name: str) -> Path:
    """Where one array is."""
    return work / f"{name}-{'x'.join(map(str, shape))}.npy"


def save(work: Path, shape: Shape, name: str, array: np.ndarray) -> None:
    """Write it whole or not at all."""
    bits = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    part = path(work, shape, f"part-{name}")
    np.save(part, bits)
    part.rename(path(work, shape, name))


def load(work: Path, shape: Shape, name: str) -> np.ndarray | None:
    """The bits; None where no section wrote them."""
    file = path(work, shape, name)
    return np.load(file) if file.exists() else None
