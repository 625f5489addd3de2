"""Calls of kernels that do not say over which axes of a mesh their results vary.

Inside `jax.shard_map` every array has in its type the axes that it varies over, and a
kernel has to say that of what it returns. Other libraries' do not. Their calls are
traced where there is no mesh, and computed again with types: results vary over what the
arguments vary over, as they are a device's own.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

# Primitives that call a function, and where they have it.
_CALLS = {
    "jit": "jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "remat_opt": "fwd_jaxpr",
}
_KERNELS = ("pallas_call", "mpmd_map")  # of a TPU, and of a GPU


def call[T](function: Callable[..., T], *args: Any, device: Any = None) -> T:
    """function(*args), which uses no collectives.

    Args:
        args: trees of arrays.
        device: which a library takes for the default one; it need not be here.
    """
    leaves, tree = jax.tree.flatten(args)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]

    def trace() -> tuple[ClosedJaxpr, Any]:
        # The library's code is written for JAX's defaults.
        with (
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
            jax.default_device(device),
        ):
            make = jax.make_jaxpr(function, return_shape=True)
            return make(*jax.tree.unflatten(tree, shapes))

    # A thread of its own begins without the mesh of this one.
    with ThreadPoolExecutor(max_workers=1) as pool:
        jaxpr, out = pool.submit(trace).result()
    axes = {a for x in leaves for a in jax.typeof(x).manual_axis_type.varying}
    found = _evaluate(jaxpr, leaves, tuple(sorted(axes)))
    return jax.tree.unflatten(jax.tree.structure(out), found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention[T](
    kernel: Callable[..., T],
    device: Any,
    query: Array,
    key: Array,
    value: Array,
    *rest: Any,
) -> T:
    """kernel(query, key, value, *rest), differentiable by the first three.

    device: see `call`.
    """
    return call(kernel, query, key, value, *rest, device=device)


def _forward(
    kernel: Any, device: Any, query: Array, key: Array, value: Array, *rest: Any
) -> tuple[Array, Any]:
    def with_pullback(query: Array, key: Array, value: Array, *rest: Any) -> Any:
        return jax.vjp(lambda *x: kernel(*x, *rest), query, key, value)

    out, pullback = call(with_pullback, query, key, value, *rest, device=device)
    return out, (pullback, [None] * len(rest))


def _backward(kernel: Any, device: Any, kept: Any, dout: Array) -> tuple[Any, ...]:
    del kernel
    pullback, nothing = kept
    grads = call(lambda pull, dout: pull(dout), pullback, dout, device=device)
    return *grads, *nothing


attention.defvjp(_forward, _backward)


def _evaluate(
    closed: ClosedJaxpr, args: Sequence[Any], axes: tuple[str, ...]
) -> list[Any]:
    """The results of a traced function, all varying over `axes`."""

    def varying(x: Any) -> Any:
        typed = jax.typeof(x).manual_axis_type.varying
        missing = tuple(axis for axis in axes if axis not in typed)
        return lax.pcast(x, missing, to="varying") if missing else x

    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, map(varying, closed.consts), strict=True))
    values |= zip(jaxpr.invars, map(varying, args), strict=True)

    def value(atom: Any) -> Any:
        if isinstance(atom, Literal):
            return varying(jax.numpy.asarray(atom.val, atom.val.dtype))
        return values[atom]

    for eqn in jaxpr.eqns:
        inputs = [value(x) for x in eqn.invars]
        # What is called is computed here, and differentiated by nobody.
        if (inner := _CALLS.get(eqn.primitive.name)) is not None:
            found = _evaluate(eqn.params[inner], inputs, axes)
        else:
            params = dict(eqn.params)
            if axes and eqn.primitive.name in _KERNELS:
                params["out_avals"] = tuple(
                    _like(jax.typeof(inputs[0]), x) for x in params["out_avals"]
                )
            found = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(params))
            found = found if eqn.primitive.multiple_results else [found]
        # What is made of nothing, as an iota is, varies over nothing yet.
        values |= zip(eqn.outvars, map(varying, found), strict=True)
    return [value(x) for x in jaxpr.outvars]


def _like(typed: Any, out: Any) -> Any:
    """The type of an array of out's shape on the mesh that `typed` is on."""
    sharding = typed.sharding.update(spec=P(*[None] * len(out.shape)))
    return typed.update(shape=out.shape, dtype=out.dtype, sharding=sharding)
