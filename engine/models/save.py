"""A decoder to a directory that transformers loads, tensor by tensor."""

import functools
import json
import logging
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from engine.errors import InputError
from engine.models.adapter_files import ADAPTER_WEIGHTS, adapter_config, adapter_name
from engine.models.checkpoint import (
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    is_tokenizer_file,
)
from engine.models.decoder import DTYPES, Decoder
from engine.models.save_directory import (
    FILES,
    OUR_NAME,
    WRITER,
    check_save_directory,
    earlier_save,
    files_in,
    replacing,
)

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 5 * 10**9
_TAGS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# What goes along from the directory that the model came from: text, but no code, no
# weights, no state of a trainer, and no tokenizer, which may be another one.
_COMPANIONS = ("*.json", "*.txt", "*.md", "*.jinja", "LICENSE*", "NOTICE*")
_NO_COMPANIONS = (CONFIG, "*.index.json", "trainer_state.json", "*_results.json")
_LARGEST_COMPANION = 2**22  # bytes


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """One tensor of the file; `layer` of a stacked parameter."""

    shape: tuple[int, ...]
    dtype: str
    array: jax.Array
    layer: int | None

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * jnp.dtype(self.dtype).itemsize


@functools.partial(jax.jit, static_argnames="sharding")
def _pick(
    array: jax.Array, layer: jax.Array | None, sharding: NamedSharding | None
) -> jax.Array:
    """One layer of a stacked array (all of any other), placed as `sharding` says."""
    if layer is not None:
        array = jax.lax.dynamic_index_in_dim(array, layer, 0, keepdims=False)
    if sharding is None:
        return array
    return jax.lax.with_sharding_constraint(array, sharding)


def _to_host(tensor: _Tensor, model: Decoder) -> np.ndarray:
    """The whole tensor, without the padding of the vocabulary."""
    array = tensor.array
    layer = None if tensor.layer is None else jnp.int32(tensor.layer)
    everywhere = None
    if not array.is_fully_addressable:  # every process gathers it
        everywhere = NamedSharding(model.mesh, P())
    # A new array also where nothing is picked: one keeps its copy on the host.
    array = _pick(array, layer, everywhere)
    return np.asarray(array)[tuple(slice(0, size) for size in tensor.shape)]


def _tensors(model: Decoder, dtype: str | None) -> Iterator[tuple[str, _Tensor]]:
    """Each tensor by its name, layer after layer; dtype None: as the input had it."""
    origin = model.config.origin
    read = {} if origin is None or dtype is not None else origin.dtypes
    adapter, arrays = model.config.adapter, model.variables()
    table = model.config.parameters()
    if adapter is not None:
        dtype = dtype or adapter.dtype
        table = {path: param for path, param in table.items() if param.trainable}
    stacked = [path for path, param in table.items() if param.stacked]
    order = [(path, None) for path in table if path not in stacked]
    order += [(p, layer) for layer in range(model.config.num_layers) for p in stacked]
    for path, layer in order:
        name = table[path].hf_name.format(layer)
        name = name if adapter is None else adapter_name(name)
        array = arrays[path][...]
        yield (
            name,
            _Tensor(
                shape=table[path].shape,
                dtype=read.get(name, dtype or array.dtype.name),
                array=array,
                layer=layer,
            ),
        )


def _write_weights(
    out: IO[bytes] | None,
    tensors: dict[str, _Tensor],
    model: Decoder,
    metadata: dict[str, str],
) -> None:
    """One safetensors file; every process gathers, the one with `out` writes.

    By hand, as the library's writers want all tensors of a file at once: here the host
    holds one tensor, where a file may have 5 GB of them.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | metadata}
    start = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _TAGS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.num_bytes],
        }
        start += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if out is not None:
        out.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors.values():
        _write_tensor(out, tensor, model)


def _write_tensor(out: IO[bytes] | None, tensor: _Tensor, model: Decoder) -> None:
    """In a function of its own, so that nothing of a tensor outlives it."""
    host = _to_host(tensor, model)
    if out is not None:
        host = np.ascontiguousarray(host.astype(jnp.dtype(tensor.dtype), copy=False))
        out.write(host.reshape(-1).view(np.uint8).data)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _saved_config(model: Decoder, tensors: dict[str, _Tensor]) -> dict[str, Any]:
    """`config.json` as read, with the dtype that (most of) the weights are saved in."""
    values = model.config.hf_config
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    keys = [key for key in ("torch_dtype", "dtype") if key in values]
    if not keys:
        keys = ["dtype" if "rope_parameters" in values else "torch_dtype"]
    values.update(dict.fromkeys(keys, max(sizes, key=lambda dtype: sizes[dtype])))
    return values


def _copy_companions(source: Path, target: Path, kept: frozenset[str]) -> None:
    """The small files of the model's own directory; `kept` are left as they are."""
    if not source.is_dir():
        logger.warning(
            "%s is no longer there: what else was in it (generation_config.json, a "
            "license) does not go along with the model",
            source,
        )
        return
    for path in sorted(source.iterdir()):
        name = path.name
        if (
            path.is_file()
            and any(fnmatch(name, pattern) for pattern in _COMPANIONS)
            and not any(fnmatch(name, pattern) for pattern in _NO_COMPANIONS)
            and not is_tokenizer_file(name)
            and name not in kept
            and path.stat().st_size <= _LARGEST_COMPANION
        ):
            shutil.copyfile(path, target / name)


def _write_all(
    staging: Path,
    directory: Path,
    model: Decoder,
    tokenizer: Any,
    tensors: dict[str, _Tensor],
    split: StateDictSplit,
) -> None:
    """Everything that a save writes, the weights last: they name all the rest."""
    adapter = model.config.adapter
    if adapter is not None:
        _write_json(staging / ADAPTER_CONFIG, adapter_config(adapter))
    elif model.config.origin is not None:
        there = {path.name for path in directory.iterdir()}
        kept = frozenset(there - earlier_save(directory))
        _copy_companions(model.config.origin.directory, staging, kept)
    if adapter is None:
        _write_json(staging / CONFIG, _saved_config(model, tensors))
    if tokenizer is not None:
        # Only here is transformers needed, whose import takes longer than jax's.
        from engine.models.tokenizer import write_tokenizer

        write_tokenizer(tokenizer, staging)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(staging / INDEX, index)
    names = json.dumps(sorted([*files_in(staging), *split.filename_to_tensors]))
    for file_name, held in split.filename_to_tensors.items():
        with open(staging / file_name, "wb") as out:
            part = {name: tensors[name] for name in held}
            _write_weights(out, part, model, {WRITER: OUR_NAME, FILES: names})


def save_pretrained(
    model: Decoder,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    dtype: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes config.json and safetensors; above `max_file_bytes` several and an index.

    The small files of the directory that the model came from go along. Of a model with
    an adapter the adapter alone is written, in PEFT's form. An earlier save in
    `directory` is replaced once the new one is whole; nothing else there is touched.
    Every process calls this; the first one writes.

    Args:
        tokenizer: one of transformers', written too; its own files, where it came from
            a directory.
        dtype: of the weights on disk; None: each as in the checkpoint that the model
            was loaded from, or the parameters' own.
    Raises:
        InputError: see `check_save_directory`; a disk that is full or fails.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"save dtype={dtype!r}; allowed: {', '.join(DTYPES)}")
    tensors = dict(_tensors(model, dtype))
    pattern = "model{suffix}.safetensors"
    if model.config.adapter is not None:  # PEFT reads a single file
        pattern, max_file_bytes = ADAPTER_WEIGHTS, 2**62
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern=pattern,
        max_shard_size=max_file_bytes,
    )
    if jax.process_index() != 0:
        for names in split.filename_to_tensors.values():
            _write_weights(None, {name: tensors[name] for name in names}, model, {})
        return
    directory = check_save_directory(directory, {})
    with replacing(directory) as staging:
        _write_all(staging, directory, model, tokenizer, tensors, split)
