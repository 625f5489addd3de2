"""A layer's linear modules on the mesh, and the adapters beside them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from engine.models.adapter import Adapter
from engine.models.dropout import Dropout
from engine.parallel.sharding import SPLIT, TENSOR


def _project(x: Array, weight: Array) -> Array:
    return jnp.einsum("RSI,OI->RSO", x, weight)


def _gathered(shard: Array, axis: int) -> Array:
    return lax.all_gather(shard, SPLIT, axis=axis, tiled=True)


@dataclass(frozen=True, kw_only=True)
class Linears:
    """The linear modules of one layer; `weights` are this device's shards.

    They are called by the names of their weights: q, k, v, o, gate, up, down.
    """

    weights: Mapping[str, Array]
    adapter: Adapter | None
    dropout: Dropout | None  # of what goes into the adapters

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
        weight = cut(weights[name]).astype(dtype)
        out = _project(x, _gathered(weight, 0 if row else 1))
        if self.adapter is None or name + "_lora_a" not in weights:
            return out
        a = weights[name + "_lora_a"].astype(dtype)
        b = cut(weights[name + "_lora_b"]).astype(dtype)
        a, b = (a, _gathered(b, 0)) if row else (_gathered(a, 1), b)
        if self.dropout is not None:
            first = lax.axis_index(TENSOR) * x.shape[-1] if row else 0
            x = self.dropout(x, name, first)
        return out + self.adapter.scale * _project(_project(x, a), b)
