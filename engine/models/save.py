"""A decoder to a directory that transformers loads, tensor by tensor."""

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engine.errors import InputError
from engine.models.decoder import DTYPES, Decoder
from engine.models.weights import INDEX, SINGLE

MAX_FILE_BYTES = 5 * 10**9
_TAGS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@jax.jit
def _pick(array: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, layer, 0, keepdims=False)


def _to_host(array: jax.Array, model: Decoder) -> np.ndarray:
    if not array.is_fully_addressable:
        whole = NamedSharding(model.mesh, P())
        array = jax.jit(lambda x: x, out_shardings=whole)(array)
    return np.asarray(array)


def _tensors(
    model: Decoder,
) -> Iterator[tuple[str, tuple[int, ...], jax.Array, int | None]]:
    """(name, shape, stored array, layer) of each tensor, layer after layer."""
    found = model.config.parameters()
    layers = {path: one for path, one in found.items() if one.stacked}
    for path, one in found.items():
        if not one.stacked:
            yield one.hf_name, one.shape, _param(model, path), None
    for layer in range(model.config.num_layers):
        for path, one in layers.items():
            yield one.hf_name.format(layer), one.shape, _param(model, path), layer


def _param(model: Decoder, path: tuple[str, ...]) -> jax.Array:
    if path[0] == "layers":
        return model.layers[path[1]][...]
    single = {"embed": model.embed, "final_norm": model.final_norm}
    return (single[path[0]] if path[0] in single else model.head)[...]


def _plan(model: Decoder, itemsize: int, limit: int) -> list[list[Any]]:
    """The tensors of each file; only a single tensor may exceed `limit` bytes."""
    files: list[list[Any]] = [[]]
    held = 0
    for tensor in _tensors(model):
        size = int(np.prod(tensor[1])) * itemsize
        if files[-1] and held + size > limit:
            files.append([])
            held = 0
        files[-1].append(tensor)
        held += size
    return files


def _write_file(
    out: IO[bytes] | None, tensors: list[Any], model: Decoder, dtype: np.dtype
):
    """One safetensors file; every process gathers, the one with `out` writes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape, _, _ in tensors:
        end = at + int(np.prod(shape)) * dtype.itemsize
        offsets = [at, end]
        header[name] = {
            "dtype": _TAGS[dtype.name],
            "shape": list(shape),
            "data_offsets": offsets,
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if out is not None:
        out.write(struct.pack("<Q", len(text)) + text)
    for _, shape, array, layer in tensors:
        part = array if layer is None else _pick(array, jnp.int32(layer))
        host = _to_host(part, model)[tuple(slice(0, size) for size in shape)]
        if out is not None:
            out.write(np.ascontiguousarray(host.astype(dtype)).tobytes())


def _write_text(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.part")
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _saved_config(model: Decoder, dtype: str) -> dict[str, Any]:
    """`config.json` as read, with the dtype that the weights are saved in."""
    values = model.hf_config
    keys = [key for key in ("torch_dtype", "dtype") if key in values]
    if not keys:
        keys = ["dtype" if "rope_parameters" in values else "torch_dtype"]
    values.update(dict.fromkeys(keys, dtype))
    return values


def save_pretrained(
    model: Decoder,
    directory: str | Path,
    *,
    dtype: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes config.json and safetensors; above `max_file_bytes` several and an index.

    Every file appears whole or not at all; weights of an earlier save are replaced.

    Args:
        dtype: of the weights on disk; the parameters' own where not given.
    """
    dtype = model.embed[...].dtype.name if dtype is None else dtype
    if dtype not in DTYPES:
        raise InputError(f"save dtype={dtype!r}; allowed: {', '.join(DTYPES)}")
    directory = Path(directory)
    kind = np.dtype(jnp.dtype(dtype))
    files = _plan(model, kind.itemsize, max_file_bytes)
    count = len(files)
    names = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    names = [SINGLE] if count == 1 else names
    writes = jax.process_index() == 0
    if writes:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{directory}: cannot be made a directory: {error}"
            ) from error
    for name, tensors in zip(names, files, strict=True):
        if not writes:
            _write_file(None, tensors, model, kind)
            continue
        with open(directory / f".{name}.part", "wb") as out:
            _write_file(out, tensors, model, kind)
    if not writes:
        return
    for stale in directory.glob("model*.safetensors"):
        if stale.name not in names:
            stale.unlink()
    for name in names:
        os.replace(directory / f".{name}.part", directory / name)
    if count == 1:
        (directory / INDEX).unlink(missing_ok=True)
    else:
        total = sum(int(np.prod(t[1])) * kind.itemsize for file in files for t in file)
        where = zip(names, files, strict=True)
        weight_map = {tensor[0]: name for name, file in where for tensor in file}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_text(directory / INDEX, index)
    _write_text(directory / "config.json", _saved_config(model, dtype))
