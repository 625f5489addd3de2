"""Checkpoints to sharded arrays: each device reads its own slices only."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open

from engine.errors import InputError
from engine.models.decoder import Decoder
from engine.models.families import DecoderConfig, parse_hf_config
from engine.models.init import placed_parameters, stored_dtype
from engine.parallel.sharding import Parameter, make_mesh

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["original/*", "consolidated*", "onnx/*"]
# Buffers that old versions of transformers saved; every model makes them itself.
_HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_FILE_DTYPES = ("BF16", "F16", "F32")

Index = tuple[slice, ...]


def resolve_directory(path_or_hub_id: str | Path) -> Path:
    """The local directory of a checkpoint; downloads it where it is a hub id."""
    name = str(path_or_hub_id)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(
            f"model {name!r} is a file; give the directory of a checkpoint"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise InputError(
            f"model {name!r}: there is no such directory, and it is no hub id "
            "(owner/name); give one of the two"
        )
    try:
        found = snapshot_download(
            name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = " ".join(str(error).split())
        raise InputError(
            f"model {name!r}: there is no such directory, and downloading it from the "
            f"hub failed: {why}"
        ) from error
    return Path(found)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; InputError where the file is missing or holds something else."""
    if not path.is_file():
        raise InputError(f"{path}: missing; a checkpoint directory needs it")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error}); mend or replace it") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: must be a JSON object, got {type(values).__name__}")
    return values


def read_config(directory: Path) -> DecoderConfig:
    """The checked `config.json` of a checkpoint directory."""
    path = directory / "config.json"
    values = read_json(path)
    try:
        return parse_hf_config(values)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from error


def _weight_files(directory: Path) -> list[Path]:
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if not (directory / INDEX).is_file():
        raise InputError(
            f"{directory}: no weights; expected {SINGLE} or {INDEX} "
            "(other formats must be converted to safetensors)"
        )
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{directory / INDEX}: weight_map is missing or empty")
    return [directory / name for name in sorted(set(map(str, weight_map.values())))]


class Reader:
    """Slices of the tensors in a checkpoint's safetensors files."""

    def __init__(self, directory: Path, stack: ExitStack):
        """Opens every file; `stack` closes them."""
        self.directory = directory
        self._handles: dict[str, Any] = {}
        for path in _weight_files(directory):
            try:
                handle = stack.enter_context(safe_open(path, "numpy"))
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{path}: not a whole safetensors file ({error}); fetch it again"
                ) from error
            self._handles.update(dict.fromkeys(handle.keys(), handle))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor, by name; InputError for a dtype that is no weight's."""
        found = {}
        for name, handle in self._handles.items():
            view = handle.get_slice(name)
            if view.get_dtype() not in _FILE_DTYPES and not _HARMLESS.search(name):
                raise InputError(
                    f"{self.directory}: tensor {name!r} is {view.get_dtype()}; "
                    f"allowed: {', '.join(_FILE_DTYPES)} (quantised ones are not)"
                )
            found[name] = tuple(view.get_shape())
        return found

    def read(self, name: str, index: Index) -> np.ndarray:
        """The part of a tensor at `index`; only that part is read."""
        return self._handles[name].get_slice(name)[index]


def _expected(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    found = {}
    for one in config.parameters().values():
        layers = range(config.num_layers) if one.stacked else [0]
        found.update({one.hf_name.format(layer): one.shape for layer in layers})
    return found


def _summary(names: list[str]) -> str:
    """All names; those that differ in their layer alone are written once."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    plain: list[str] = []
    for name in names:
        parts = re.fullmatch(r"(.*\.layers\.)(\d+)(\..*)", name)
        if parts:
            groups[parts[1], parts[3]].append(int(parts[2]))
        else:
            plain.append(name)
    for (before, after), layers in groups.items():
        layers.sort()
        whole = len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1
        said = f"{layers[0]}..{layers[-1]}" if whole else ",".join(map(str, layers))
        plain.append(before + (f"{{{said}}}" if len(layers) > 1 else said) + after)
    return ", ".join(sorted(plain))


def check_tensors(
    config: DecoderConfig, shapes: Mapping[str, tuple[int, ...]], where: Path
):
    """InputError naming every tensor that is missing, extra or of another shape."""
    expected = _expected(config)
    tied_head = {"lm_head.weight"} if config.tie_word_embeddings else set()
    extra = [
        name
        for name in shapes
        if name not in expected and name not in tied_head and not _HARMLESS.search(name)
    ]
    missing = [name for name in expected if name not in shapes]
    wrong = [
        f"{name} is {shapes[name]}, not {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    problems = [
        f"{kind}: {text}"
        for kind, text in (
            ("missing", _summary(missing)),
            ("extra", _summary(extra)),
            ("mis-shaped", "; ".join(wrong)),
        )
        if text
    ]
    if problems:
        raise InputError(
            f"{where}: tensors do not match config.json ({config.model_type}): "
            f"{'; '.join(problems)}"
        )


def _read_block(
    reader: Reader,
    parameter: Parameter,
    index: Index,
    shape: tuple[int, ...],
    dtype: Any,
) -> np.ndarray:
    """One shard of a stored array; vocabulary beyond the file's stays zero."""
    bounds = [part.indices(size) for part, size in zip(index, shape, strict=True)]
    block = np.zeros([stop - start for start, stop, _ in bounds], dtype)
    lead = 1 if parameter.stacked else 0
    limits = zip(bounds[lead:], parameter.shape, strict=True)
    inner = tuple(slice(min(a, size), min(b, size)) for (a, b, _), size in limits)
    if not parameter.stacked:
        found = reader.read(parameter.hf_name, inner)
        block[tuple(slice(0, size) for size in found.shape)] = found
        return block
    for layer in range(*bounds[0]):
        name = parameter.hf_name.format(layer)
        block[layer - bounds[0][0]] = reader.read(name, inner)
    return block


def _sharded(
    shape: tuple[int, ...], sharding: NamedSharding, make: Callable[[Index], np.ndarray]
) -> jax.Array:
    """An array whose distinct local shards are made on the host one after the other."""
    places: dict[Index, list[Any]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        places[index].append(device)
    pieces = []
    for index, devices in places.items():
        block = make(index)
        pieces += [jax.device_put(block, device) for device in devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def load_model(
    path_or_hub_id: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: str = "bfloat16",
    param_dtype: str = "float32",
    remat: str = "full",
) -> Decoder:
    """A decoder from a checkpoint directory or a hub id, cut over `mesh`.

    The host holds one shard of one parameter at a time.

    Args:
        mesh: all local devices on the fsdp axis where not given.
        dtype: of the computation. param_dtype: of the stored parameters.

    Raises:
        InputError: an unsupported model; missing, extra or mis-shaped tensors.
    """
    mesh = make_mesh() if mesh is None else mesh
    stored = stored_dtype(param_dtype)
    directory = resolve_directory(path_or_hub_id)
    config = read_config(directory)
    arrays = {}
    with ExitStack() as stack:
        reader = Reader(directory, stack)
        check_tensors(config, reader.shapes(), directory)
        for path, one, shape, sharding in placed_parameters(config, mesh):

            def make(index: Index, one=one, shape=shape) -> np.ndarray:
                return _read_block(reader, one, index, shape, stored)

            arrays[path] = _sharded(shape, sharding, make)
    return Decoder(config, arrays, mesh=mesh, dtype=dtype, remat=remat)
