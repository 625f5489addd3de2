"""The plain form of some pairs: each sequence in a row of its own, without kernels.

On one device where the whole model fits there, so that nothing of it is spread either;
else on the devices that have it, of which none has part of a row.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Int64

from engine.data.assembly import assemble
from engine.data.pair_tokens import PairTokens
from engine.data.shapes import LENGTH_UNIT, SCORED_UNIT, round_up
from engine.models import Decoder
from engine.objective.scoring import ScoringOptions
from engine.parallel import processes
from engine.parallel.batch import PADDED, Batch, own_shards
from engine.parallel.sharding import (
    AXES,
    BATCH,
    DATA,
    SPLIT,
    TENSOR,
    make_mesh,
    parameter_spec,
    place,
    size_of,
    stored_shape,
)

# Of a device's memory: what a copy of the model may take, and what is taken with it.
_COPY, _TAKEN = 1 / 8, 1 / 2
_UNKNOWN = 8 * 2**30  # bytes of a device that does not say what it has


def plain_scoring(options: ScoringOptions) -> ScoringOptions:
    """What it is scored by: plain JAX."""
    return replace(options, arrangement=PADDED, attention="tiles", implementation="xla")


def plain_batch(
    pairs: PairTokens, members: Int64[np.ndarray, " pairs"], mesh: Mesh
) -> Batch:
    """These pairs in their order, one at a time on each device that has rows."""
    shards = size_of(BATCH, mesh)
    longest = pairs.lengths.reshape(-1, 2)[members].max()
    most = pairs.num_scored.reshape(-1, 2).sum(axis=1)[members].max()
    shape = round_up(int(longest), LENGTH_UNIT), round_up(int(most), SCORED_UNIT)
    filled = np.full(round_up(len(members), shards), -1)
    filled[: len(members)] = members
    batch, _ = assemble(pairs, filled.reshape(-1, shards, 1), shape, own_shards(mesh))
    return without_values(batch)


def without_values(batch: Batch) -> Batch:
    """A batch that is scored, whatever the reference gives."""
    return batch._replace(pairs=batch.pairs._replace(ref_logps=None))


def plain_model(model: Decoder) -> Decoder:
    """A model of the same weights, where the plain form is computed.

    What there is of them already is not copied. They may be rounded to what is computed
    with, as every use of them is.
    """
    mesh = model.mesh
    if mesh.size > 1 and processes.count() == 1 and _fits(model):
        return _on_one_device(model)
    return _on_same_devices(model)


def computing_in(model: Decoder, dtype: str) -> Decoder:
    """The same arrays in another dtype; nothing is computed by tiles or again."""
    arrays = {path: x.get_value() for path, x in model.variables().items()}
    return Decoder(model.config, arrays, mesh=model.mesh, dtype=dtype, remat="none")


def _fits(model: Decoder) -> bool:
    """Whether a copy of all weights on one device is little beside what it has."""
    copied = sum(
        x.size * model.dtype.itemsize
        for x in jax.tree.leaves(nnx.state(model))
        if not x.is_fully_replicated
    )
    stats = model.mesh.devices.flat[0].memory_stats() or {}
    limit = stats.get("bytes_limit") or _UNKNOWN
    taken = copied + stats.get("bytes_in_use", 0)
    return copied <= _COPY * limit and taken <= _TAKEN * limit


def _on_one_device(model: Decoder) -> Decoder:
    device = model.mesh.devices.flat[0]
    mesh = make_mesh(1, 1, 1, devices=[device])

    def whole(x: Any, rows: int) -> Any:
        if x.is_fully_replicated:
            (own,) = (s.data for s in x.addressable_shards if s.device == device)
            x = own
        else:
            x = x if x.dtype == model.dtype else x.astype(model.dtype)
            x = jax.device_put(x, device)
        # Behind the vocabulary lies what pads it to all devices.
        return x[:rows] if len(x) > rows else x

    return _with(model, mesh, lambda x, shape, _: whole(x, shape[0]))


def _on_same_devices(model: Decoder) -> Decoder:
    """Where rows are spread over devices, these have parts of the parameters alone."""
    mesh = model.mesh
    sizes = mesh.shape[DATA], size_of(SPLIT, mesh), 1, mesh.shape[TENSOR]
    mesh = Mesh(mesh.devices.reshape(sizes), AXES, axis_types=mesh.axis_types)

    def same(x: Any, _: Sequence[int], sharding: NamedSharding) -> Any:
        parts = [s.data for s in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

    return _with(model, mesh, same)


def _with(model: Decoder, mesh: Mesh, made: Any) -> Decoder:
    """The model on another mesh, its arrays made of the shapes and shardings there."""
    table, config = model.config.parameters(), model.config
    arrays = {}
    for path, variable in model.variables().items():
        one = table[path]
        sharding = place(parameter_spec(one, config, mesh), mesh)
        arrays[path] = made(
            variable.get_value(), stored_shape(one, config, mesh), sharding
        )
    return Decoder(config, arrays, mesh=mesh, dtype=model.dtype.name, remat="none")
