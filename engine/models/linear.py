"""A layer's linear modules on the mesh, and the adapters beside them."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from engine.models.adapter import Adapter
from engine.models.dropout import Dropout
from engine.parallel.sharding import SPLIT, TENSOR


def _project(x: Array, weight: Array) -> Array:
    return jnp.einsum("RSI,OI->RSO", x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(shard: Array, axis: int, dtype: str, reduce_dtype: str) -> Array:
    """A weight whole along `fsdp` and `sequence`, in `dtype`.

    Its gradient is this device's shard of the sum over these, added up in
    `reduce_dtype`: of the cast's and the gather's own that would be `dtype`.
    """
    del reduce_dtype
    return lax.all_gather(shard.astype(dtype), SPLIT, axis=axis, tiled=True)


def _gather(shard: Array, axis: int, dtype: str, reduce_dtype: str) -> Any:
    # Of the shard nothing but its dtype is needed.
    return gathered(shard, axis, dtype, reduce_dtype), jnp.zeros((0,), shard.dtype)


def _reduce_scatter(
    axis: int, dtype: str, reduce_dtype: str, like: Array, gradient: Array
) -> tuple[Array]:
    del dtype
    # Along the first axis: of another, libtpu adds up the whole gradient on each device
    # of a torus with several dimensions, and then takes a part.
    parts = jnp.moveaxis(gradient.astype(reduce_dtype), axis, 0)
    total = lax.psum_scatter(parts, SPLIT, scatter_dimension=0, tiled=True)
    return (jnp.moveaxis(total, 0, axis).astype(like.dtype),)


gathered.defvjp(_gather, _reduce_scatter)


@dataclass(frozen=True, kw_only=True)
class Linears:
    """The linear modules of one layer; `weights` are this device's shards.

    They are called by the names of their weights: q, k, v, o, gate, up, down.
    """

    weights: Mapping[str, Array]
    adapter: Adapter | None
    dropout: Dropout | None  # of what goes into the adapters
    reduce_dtype: str  # of the sums of gradients over fsdp

    def column(
        self, x: Array, name: str, cut: Callable[[Array], Array] = lambda w: w
    ) -> Array:
        """This device's features of the output, of all of x's.

        cut: of weights whose outputs the device has more of than it uses.
        """
        out, bias = self._product(x, name, cut=cut), self.weights.get(name + "_bias")
        return out if bias is None else out + cut(bias).astype(x.dtype)[None, None, :]

    def row(self, x: Array, name: str) -> Array:
        """All features of the output, of this device's part of x's."""
        out = lax.psum(self._product(x, name, row=True), TENSOR)
        bias = self.weights.get(name + "_bias")
        return out if bias is None else out + bias.astype(x.dtype)[None, None, :]

    def _product(self, x: Array, name: str, *, row=False, cut=lambda w: w) -> Array:
        """x W^T + scale (x A^T) B^T, the latter where the module has an adapter.

        Where `row`, both are this device's part of a sum over `tensor`.
        """
        weights, dtype = self.weights, x.dtype

        def whole(shard: Array, axis: int) -> Array:
            return gathered(shard, axis, dtype.name, self.reduce_dtype)

        out = _project(x, whole(cut(weights[name]), 0 if row else 1))
        if self.adapter is None or name + "_lora_a" not in weights:
            return out
        a, b = weights[name + "_lora_a"], cut(weights[name + "_lora_b"])
        if row:
            a, b = a.astype(dtype), whole(b, 0)
        else:
            a, b = whole(a, 1), b.astype(dtype)
        if self.dropout is not None:
            first = lax.axis_index(TENSOR) * x.shape[-1] if row else 0
            x = self.dropout(x, name, first)
        return out + self.adapter.scale * _project(_project(x, a), b)
