"""Checkpoints to sharded arrays: each device reads its own slices only."""

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from engine.errors import InputError, shown
from engine.models.checkpoint import resolve_directory
from engine.models.decoder import Decoder
from engine.models.init import placed_parameters, stored_dtype
from engine.models.reader import Index, Reader
from engine.models.tensors import compare_unread, open_checkpoint
from engine.parallel.sharding import Parameter, make_mesh


def read_block(
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
        part = reader.read(parameter.hf_name, inner)
        block[tuple(slice(0, size) for size in part.shape)] = part
        return block
    for layer in range(*bounds[0]):
        name = parameter.hf_name.format(layer)
        block[layer - bounds[0][0]] = reader.read(name, inner)
    return block


def sharded(
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
    reduce_dtype: str | None = None,
    mlp_tile: int | None = None,
) -> Decoder:
    """A decoder from a checkpoint directory or a hub id, sharded over `mesh`.

    The host holds one shard of one parameter at a time.

    Args:
        mesh: all local devices on the fsdp axis where not given.
        dtype: of the computation. param_dtype: of the stored parameters.
        reduce_dtype: of the sums of gradients over fsdp; None: `dtype`.
        mlp_tile: see `Decoder`.

    Raises:
        InputError: an unsupported model; missing, extra or mis-shaped tensors.
    """
    if mesh is not None and not isinstance(mesh, Mesh):
        raise InputError(
            f"mesh={shown(mesh)} must be a jax.sharding.Mesh; make one with "
            "engine.parallel.sharding.make_mesh, or leave it out"
        )
    mesh = make_mesh() if mesh is None else mesh
    stored = stored_dtype(param_dtype)
    directory = resolve_directory(path_or_hub_id)
    arrays = {}
    with ExitStack() as stack:
        config, reader = open_checkpoint(directory, stack)
        config = compare_unread(config, reader)
        for path, param, shape, sharding in placed_parameters(config, mesh):

            def make(index: Index, param=param, shape=shape) -> np.ndarray:
                return read_block(reader, param, index, shape, stored)

            arrays[path] = sharded(shape, sharding, make)
    return Decoder(
        config,
        arrays,
        mesh=mesh,
        dtype=dtype,
        remat=remat,
        reduce_dtype=reduce_dtype,
        mlp_tile=mlp_tile,
    )
