"""Decoders that come from no checkpoint: random ones, and abstract ones."""

import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from engine.errors import InputError
from engine.models.architecture import DecoderConfig
from engine.models.decoder import DTYPES, Decoder
from engine.parallel.sharding import (
    Parameter,
    ParameterPath,
    check_mesh,
    make_mesh,
    parameter_spec,
    place,
    stored_shape,
)


def placed_parameters(
    config: DecoderConfig, mesh: Mesh
) -> Iterator[tuple[ParameterPath, Parameter, tuple[int, ...], NamedSharding]]:
    """(path, parameter, shape in memory, sharding) of each; checks the mesh first."""
    check_mesh(config, mesh)
    for path, param in config.parameters().items():
        sharding = place(parameter_spec(param, config, mesh), mesh)
        yield path, param, stored_shape(param, config, mesh), sharding


def stored_dtype(name: str) -> Any:
    """The dtype that a `param_dtype` names."""
    if name not in DTYPES:
        raise InputError(f"model param_dtype={name!r}; allowed: {', '.join(DTYPES)}")
    return jnp.dtype(name)


@partial(jax.jit, static_argnames=("true", "shape", "dtype", "sharding"))
def _normal(key, std, *, true, shape, dtype, sharding):
    """Normal numbers of shape `true`, zeros up to `shape`."""
    drawn = std * jax.random.normal(key, true, jnp.float32)
    pad = [(0, size - real) for size, real in zip(shape, true, strict=True)]
    whole = jnp.pad(drawn, pad).astype(dtype)
    return jax.lax.with_sharding_constraint(whole, sharding)


def init_model(
    config: DecoderConfig,
    *,
    mesh: Mesh | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    param_dtype: str = "float32",
    remat: str = "full",
    reduce_dtype: str | None = None,
    mlp_tile: int | None = None,
) -> Decoder:
    """Random weights, made where they live; the same ones on every mesh.

    Weights are normal with `initializer_range`, norms leave their input's scale as
    it is, biases are 0.
    """
    assert config.adapter is None, "add_adapter gives a model its adapter"
    mesh = make_mesh() if mesh is None else mesh
    stored = stored_dtype(param_dtype)
    config = replace(config, origin=None)
    arrays = {}
    for path, param, shape, sharding in placed_parameters(config, mesh):
        name = path[-1]
        if param.norm or name.endswith("_bias"):
            value = 1.0 if param.norm and not config.gemma else 0.0
            block = np.full(sharding.shard_shape(shape), value, stored)
            arrays[path] = jax.make_array_from_callback(
                shape, sharding, lambda _, block=block: block
            )
            continue
        arrays[path] = _normal(
            jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode())),
            config.initializer_range,
            true=shape[: len(shape) - len(param.shape)] + param.shape,
            shape=shape,
            dtype=stored,
            sharding=sharding,
        )
    return Decoder(
        config,
        arrays,
        mesh=mesh,
        dtype=dtype,
        remat=remat,
        reduce_dtype=reduce_dtype,
        mlp_tile=mlp_tile,
    )


def abstract_model(
    config: DecoderConfig,
    *,
    mesh: Mesh,
    dtype: str = "bfloat16",
    param_dtype: str = "float32",
    remat: str = "full",
    reduce_dtype: str | None = None,
    mlp_tile: int | None = None,
) -> Decoder:
    """A decoder of `jax.ShapeDtypeStruct`s, to compile for absent devices.

    param_dtype: of the trainable parameters; the others are in the compute dtype.
    """
    stored, frozen = stored_dtype(param_dtype), stored_dtype(dtype)
    arrays = {
        path: jax.ShapeDtypeStruct(
            shape, stored if param.trainable else frozen, sharding=sharding
        )
        for path, param, shape, sharding in placed_parameters(config, mesh)
    }
    return Decoder(
        config,
        arrays,
        mesh=mesh,
        dtype=dtype,
        remat=remat,
        reduce_dtype=reduce_dtype,
        mlp_tile=mlp_tile,
    )
