"""Sums over the mesh, by meaning; all inside `shard_map`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from engine.parallel.sharding import TOKENS


def axes_of(spec: P) -> tuple[str, ...]:
    """The mesh axes that an array is sharded over."""
    found: list[str] = []
    for entry in spec:
        found += (entry,) if isinstance(entry, str) else entry or ()
    return tuple(found)


def zeros_like(x: Array | jax.ShapeDtypeStruct) -> Array:
    """Zeros of the same type, the axes that it varies over included."""
    axes = tuple(sorted(jax.typeof(x).manual_axis_type.varying))
    zeros = jnp.zeros(x.shape, x.dtype)
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


def vary_over_tokens[Params](params: Params, specs: Params) -> Params:
    """Parameters typed as varying over the axes that tokens are split over.

    Their gradients then stay this device's own until `sum_over_tokens` adds them up:
    once a step, not once a microbatch, and for a layer after its reduce-scatter.
    """

    def vary(x: Array, spec: P) -> Array:
        missing = tuple(axis for axis in TOKENS if axis not in axes_of(spec))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, params, specs)


def sum_over_tokens[Params](grads: Params, specs: Params) -> Params:
    """The gradients of all devices that have tokens of their own, added up."""
    return jax.tree.map(
        lambda x, spec: lax.psum(x, tuple(a for a in TOKENS if a not in axes_of(spec))),
        grads,
        specs,
    )


def global_norm(tree: Any, specs: Any) -> Float[Array, ""]:
    """The 2-norm over the whole mesh, each element counted once; float32."""
    total = jnp.zeros(())
    for x, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True):
        squares = jnp.sum(jnp.square(x.astype(jnp.float32)))
        total += lax.psum(squares, axes_of(spec)) if axes_of(spec) else squares
    return jnp.sqrt(total)


def after[T](tree: T, earlier: Any, mesh: Mesh) -> T:
    """`tree` as it is, but on several CPU devices not before `earlier` is computed.

    For what has collectives and does not need a loop that has some, too. XLA begins
    both in the same order on every CPU device, but does not wait for the loop to end,
    and tells collectives apart by their devices alone. So one device's may meet another
    one of the other device: wrong numbers in one step of a hundred, a crash, or a hang.
    Other backends run collectives one by one in the order of the program.
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform != "cpu":
        return tree
    # A sum over the mesh that is 0, and that the compiler does not know to be.
    never = jnp.int32(0)
    for x in jax.tree.leaves(earlier):
        first = jnp.ravel(x)[0].astype(jnp.float32)
        never += jnp.int32(jnp.isnan(first) & jnp.isfinite(first))
    if axes := tuple(sorted(jax.typeof(never).manual_axis_type.varying)):
        never = lax.psum(never, axes)
    return jax.tree.map(lambda x: jnp.where(never == 0, x, jnp.zeros_like(x)), tree)
