"""Slices of a checkpoint's tensors, each read when it is needed."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from engine.errors import InputError, library_errors
from engine.models.checkpoint import weight_files, why_unreadable

# A buffer that old versions of transformers saved and every version computes itself.
ROPE_BUFFER = re.compile(r"(?:^|.*\.)(?:(\d+)\.self_attn\.)?rotary_emb\.inv_freq")
_FILE_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}

Index = tuple[slice, ...]


class Reader:
    """Slices of the tensors in a checkpoint's safetensors files."""

    def __init__(
        self,
        directory: Path,
        stack: ExitStack,
        files: Callable[[Path], tuple[list[Path], dict[str, str]]] = weight_files,
    ):
        """Opens every file; `stack` closes them.

        files: finds them, and the file that each tensor must be in, where that is said.
        """
        self.directory = directory
        # Of each tensor: the file, its path, and the name that it has there.
        self._handles: dict[str, tuple[Any, Path, str]] = {}
        paths, weight_map = files(directory)
        for path in paths:
            with library_errors(lambda error, path=path: why_unreadable(path, error)):
                handle = stack.enter_context(safe_open(path, "numpy"))
                names = list(handle.keys())
            for name in names:
                if weight_map.get(name, path.name) != path.name:
                    raise InputError(
                        f"{path}: holds {name!r}, which the index says is in "
                        f"{weight_map[name]}; fetch the checkpoint again"
                    )
                if name in self._handles:
                    raise InputError(
                        f"{path}: holds {name!r}, as another of the files does; fetch "
                        "the checkpoint again"
                    )
                self._handles[name] = handle, path, name

    def __contains__(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._handles

    def alias(self, name: str, stored: str) -> None:
        """Lets `name` mean the tensor that is stored as `stored`."""
        self._handles[name] = self._handles.pop(stored)

    def _slice(self, name: str) -> Any:
        handle, _, stored = self._handles[name]
        return handle.get_slice(stored)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, by name."""
        return {name: tuple(self._slice(name).get_shape()) for name in self._handles}

    def dtypes(self) -> dict[str, str]:
        """Dtype of each tensor, by name; InputError for one that no weight has."""
        dtypes = {}
        for name in self._handles:
            tag = self._slice(name).get_dtype()
            if tag not in _FILE_DTYPES and not ROPE_BUFFER.fullmatch(name):
                raise InputError(
                    f"{self.directory}: tensor {name!r} is {tag}; "
                    f"allowed: {', '.join(_FILE_DTYPES)} (quantised ones are not)"
                )
            dtypes[name] = _FILE_DTYPES.get(tag, tag)
        return dtypes

    def read(self, name: str, index: Index) -> np.ndarray:
        """The part of a tensor at `index`; only that part is read."""
        path = self._handles[name][1]
        with library_errors(lambda error: why_unreadable(path, error)):
            return self._slice(name)[index]
