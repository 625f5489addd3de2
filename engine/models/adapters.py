"""Adapters on a decoder: new ones, from a file, or merged into the weights."""

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from engine.errors import InputError
from engine.models.adapter import LINEARS, Adapter
from engine.models.adapter_files import open_adapter
from engine.models.architecture import DecoderConfig
from engine.models.checkpoint import resolve_directory
from engine.models.decoder import Decoder
from engine.models.init import placed_parameters, stored_dtype
from engine.models.reader import Index
from engine.models.weights import read_block, sharded
from engine.parallel.sharding import Parameter, ParameterPath

_Make = Callable[[ParameterPath, Parameter, tuple[int, ...], NamedSharding], jax.Array]


def add_adapter(
    model: Decoder, adapter: Adapter, *, param_dtype: str = "float32", seed: int = 0
) -> Decoder:
    """`model` with a new adapter, which changes nothing yet; the same on every mesh.

    A is uniform within 1 / sqrt(in), as in PEFT, and B is 0. The model's own arrays are
    shared, and frozen; in `model` those that are not in the dtype of the computation
    are replaced by ones that are.
    """
    dtype = stored_dtype(param_dtype)

    def make(path, param, shape, sharding) -> jax.Array:
        name = path[-1]
        if name.endswith("_lora_b"):
            block = np.zeros(sharding.shard_shape(shape), dtype)
            return jax.make_array_from_callback(shape, sharding, lambda _: block)
        return _uniform(
            jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())),
            bound=1 / math.sqrt(shape[-1]),
            shape=shape,
            dtype=dtype,
            sharding=sharding,
        )

    return _with_adapter(model, adapter, make)


@functools.partial(jax.jit, static_argnames=("bound", "shape", "dtype", "sharding"))
def _uniform(key, *, bound, shape, dtype, sharding):
    drawn = jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)
    return jax.lax.with_sharding_constraint(drawn, sharding)


def load_adapter(
    model: Decoder,
    directory: str | Path,
    *,
    param_dtype: str = "float32",
    adapter: Adapter | None = None,
    what: str = "adapter",
) -> Decoder:
    """`model` with the PEFT adapter of a directory or hub id; shares as `add_adapter`.

    Args:
        adapter: what the file is known to hold, where that was checked before.
        what: the directory is, for messages.
    Raises:
        InputError: an adapter that is not LoRA, has an option that is not implemented
            here, or whose tensors do not fit the model.
    """
    dtype = stored_dtype(param_dtype)
    with ExitStack() as stack:
        directory = resolve_directory(directory, what)
        found, reader = open_adapter(directory, model.config, stack)

        def make(path, param, shape, sharding) -> jax.Array:
            def block(index: Index) -> np.ndarray:
                return read_block(reader, param, index, shape, dtype)

            return sharded(shape, sharding, block)

        return _with_adapter(model, adapter or found, make)


def _with_adapter(model: Decoder, adapter: Adapter, make: _Make) -> Decoder:
    if model.config.adapter is not None:
        raise InputError(
            "the model has an adapter already; give the model that is beneath it"
        )
    arrays = _in_compute_dtype(model)
    config = replace(model.config, adapter=adapter)
    for path, param, shape, sharding in placed_parameters(config, model.mesh):
        if param.trainable:
            arrays[path] = make(path, param, shape, sharding)
    return decoder_like(model, config, arrays)


def _in_compute_dtype(model: Decoder) -> dict[ParameterPath, Any]:
    """A model's arrays, cast in place, one after the other: every use has that cast."""
    for variable in model.variables().values():
        x = variable[...]
        if x.dtype != model.dtype:
            variable.set_value(x.astype(model.dtype))
    return {path: variable[...] for path, variable in model.variables().items()}


def decoder_like(
    model: Decoder, config: DecoderConfig, arrays: Mapping[ParameterPath, Any]
) -> Decoder:
    """Another decoder, which computes as `model` does."""
    return Decoder(
        config,
        arrays,
        mesh=model.mesh,
        dtype=model.dtype.name,
        remat=model.remat,
        reduce_dtype=model.reduce_dtype,
        mlp_tile=model.mlp_tile,
    )


def without_adapter(model: Decoder) -> Decoder:
    """The model beneath an adapter, with the very same arrays."""
    config = replace(model.config, adapter=None)
    found = model.variables()
    arrays = {path: found[path].get_value() for path in config.parameters()}
    return decoder_like(model, config, arrays)


def with_own_adapter(model: Decoder) -> Decoder:
    """The same model on the same base, with a copy of its adapter."""
    table = model.config.parameters()

    def own(x: Any) -> Any:  # a shape is as good as its copy
        return x if isinstance(x, jax.ShapeDtypeStruct) else jnp.copy(x)

    arrays = {
        path: own(x.get_value()) if table[path].trainable else x.get_value()
        for path, x in model.variables().items()
    }
    return decoder_like(model, model.config, arrays)


def merged(model: Decoder) -> Decoder:
    """The model without an adapter whose weights do what both did; base is used up."""
    adapter = model.config.adapter
    assert adapter is not None, "there is nothing to merge"
    arrays = {path: x[...] for path, x in without_adapter(model).variables().items()}
    found = model.variables()
    for module in adapter.modules:
        name = LINEARS[module]
        a, b = (found["layers", f"{name}_lora_{x}"][...] for x in "ab")
        weight = arrays.pop(("layers", name))
        arrays["layers", name] = _merge(
            weight, a, b, scale=adapter.scale, sharding=weight.sharding
        )
    return decoder_like(model, replace(model.config, adapter=None), arrays)


@functools.partial(
    jax.jit, static_argnames=("scale", "sharding"), donate_argnames="weight"
)
def _merge(weight, a, b, *, scale, sharding):
    """W + scale * B A of each layer, rounded once."""

    def one(layer):
        w, a, b = (x.astype(jnp.float32) for x in layer)
        change = jnp.einsum("OR,RI->OI", b, a, precision=jax.lax.Precision.HIGHEST)
        return (w + scale * change).astype(weight.dtype)

    whole = jax.lax.map(one, (weight, a, b))
    return jax.lax.with_sharding_constraint(whole, sharding)
