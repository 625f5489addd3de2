"""A layer's linear modules on the mesh, and the adapters beside them."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dpo_kernels.op.devices import traced_device
from engine.models.adapter import Adapter
from engine.models.dropout import Dropout
from engine.parallel.sharding import SPLIT, TENSOR


class Module(NamedTuple):
    """What a linear module multiplies with, whole along `fsdp` and `sequence`.

    x W^T + bias + scale (x A^T) B^T, the last where it has an adapter. Of weights that
    are not trained there is no gradient: None, where a `Module` holds gradients.
    """

    weight: Array | None = None
    bias: Array | None = None
    a: Array | None = None
    b: Array | None = None

    def __call__(
        self,
        x: Float[Array, "R S I"],
        scale: float = 0.0,
        dropped: Callable[[Array], Array] = lambda x: x,
        gradients: "Module | None" = None,
    ) -> Float[Array, "R S O"]:
        """The output; see `_project` for what `gradients` are.

        dropped: what goes into the adapter, of x.
        """
        into = gradients or Module()
        assert self.weight is not None
        out = _project(x, self.weight, into.weight)
        if self.bias is not None:
            out = _add(out, self.bias, into.bias)
        if self.a is None or self.b is None:
            return out
        low = _project(dropped(x), self.a, into.a)
        return out + scale * _project(low, self.b, into.b)


def _project(x: Array, weight: Array, gradient: Array | None = None) -> Array:
    """x W^T. What is differentiated is `gradient`, where it is given, not the weight.

    Its value has no effect: it is an accumulator, in float32, for those who add up
    gradients of parts of x, which the weight's own dtype would round one by one.
    """
    if gradient is not None:
        return _project_into(x, weight, gradient)
    return jnp.einsum("RSI,OI->RSO", x, weight)


@jax.custom_vjp
def _project_into(x: Array, weight: Array, gradient: Array) -> Array:
    del gradient
    return _project(x, weight)


def _project_forward(x: Array, weight: Array, gradient: Array) -> Any:
    return _project_into(x, weight, gradient), (x, weight)


def _project_backward(saved: tuple[Array, Array], dout: Array) -> Any:
    x, weight = saved
    dweight = jnp.einsum("RSO,RSI->OI", dout, x, preferred_element_type=jnp.float32)
    return jnp.einsum("RSO,OI->RSI", dout, weight), None, dweight


_project_into.defvjp(_project_forward, _project_backward)


def _add(out: Array, bias: Array, gradient: Array | None = None) -> Array:
    """out + bias; `gradient` as in `_project`."""
    if gradient is not None:
        return _add_into(out, bias, gradient)
    return out + bias.astype(out.dtype)[None, None, :]


@jax.custom_vjp
def _add_into(out: Array, bias: Array, gradient: Array) -> Array:
    del gradient
    return _add(out, bias)


_add_into.defvjp(
    lambda out, bias, gradient: (_add_into(out, bias, gradient), ()),
    lambda _, dout: (dout, None, dout.sum(axis=(0, 1), dtype=jnp.float32)),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(shard: Array, axis: int, dtype: str, reduce_dtype: str) -> Array:
    """A weight whole along `fsdp` and `sequence`, in `dtype`.

    Its gradient is this device's shard of the sum over these, added up in
    `reduce_dtype`: of the cast's and the gather's own that would be `dtype`.
    """
    del reduce_dtype
    if traced_device().platform != "gpu":
        return lax.all_gather(shard.astype(dtype), SPLIT, axis=axis, tiled=True)
    # There XLA gathers along the first axis alone; for another one it keeps transposed
    # copies of the shards of all layers. So what is gathered of one is transposed.
    parts = lax.all_gather(shard.astype(dtype), SPLIT)
    whole = jnp.moveaxis(parts, 0, axis)
    return whole.reshape(*shard.shape[:axis], -1, *shard.shape[axis + 1 :])


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

    @property
    def scale(self) -> float:
        """Of what adapters add."""
        return 0.0 if self.adapter is None else self.adapter.scale

    def column(
        self, x: Array, name: str, cut: Callable[[Array], Array] = lambda w: w
    ) -> Array:
        """This device's features of the output, of all of x's.

        cut: of weights whose outputs the device has more of than it uses.
        """
        module = self.module(name, x.dtype, cut=cut)
        return module(x, self.scale, dropping(self.dropout, name))

    def row(self, x: Array, name: str) -> Array:
        """All features of the output, of this device's part of x's."""
        module = self.module(name, x.dtype, row=True)
        out = module(x, self.scale, dropping(self.dropout, name, row=True))
        return self.sum_row(out, name)

    def sum_row(self, out: Array, name: str) -> Array:
        """The output, of this device's part of that sum."""
        out, bias = lax.psum(out, TENSOR), self.weights.get(name + "_bias")
        return out if bias is None else _add(out, bias)

    def module(
        self,
        name: str,
        dtype: Any,
        *,
        row: bool = False,
        cut: Callable[[Array], Array] = lambda w: w,
    ) -> Module:
        """Its weights, gathered. Where `row` its output is a part of a sum over
        `tensor`, to which `sum_row` adds the bias."""
        weights, dtype = self.weights, jnp.dtype(dtype)

        def whole(shard: Array, axis: int) -> Array:
            return gathered(shard, axis, dtype.name, self.reduce_dtype)

        weight = whole(cut(weights[name]), 0 if row else 1)
        bias = None if row else weights.get(name + "_bias")
        bias = None if bias is None else cut(bias)
        if self.adapter is None or name + "_lora_a" not in weights:
            return Module(weight, bias)
        a, b = weights[name + "_lora_a"], cut(weights[name + "_lora_b"])
        if row:
            return Module(weight, bias, a.astype(dtype), whole(b, 0))
        return Module(weight, bias, whole(a, 1), b.astype(dtype))


def dropping(
    dropout: Dropout | None, name: str, *, row: bool = False
) -> Callable[[Array], Array]:
    """What of a module's input goes into its adapter.

    Where `row` the input is this device's part of the features.
    """

    def dropped(x: Array) -> Array:
        if dropout is None:
            return x
        first = lax.axis_index(TENSOR) * x.shape[-1] if row else 0
        return dropout(x, name, first)

    return dropped
