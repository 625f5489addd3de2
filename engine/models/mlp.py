"""A layer's MLP, of all tokens at once or of a tile of them at a time.

Between its products an MLP has several arrays of [tokens, intermediate_size], a few
times what a layer has besides; where the backward pass computes them again, they are
most of what it needs at once. Of a tile at a time they are small, and the gradients of
the weights are added up in float32, as one product over all tokens adds them up.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from dpo_kernels.op.blocks import block_sizes, in_blocks, out_of_blocks
from dpo_kernels.op.loops import make_varying, varying_axes
from engine.models.dropout import Dropout
from engine.models.linear import Linears, Module, dropping
from engine.parallel.collectives import zeros_like

# At an accelerator's rates the traffic of the float32 gradients that each tile adds to
# takes some hundredths of the time of its products. A CPU multiplies slowly.
_TILE, _TILE_OF_CPUS = 16384, 512

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Modules(NamedTuple):
    """The three, or gradients of them."""

    gate: Module = Module()
    up: Module = Module()
    down: Module = Module()


def tile_of(mesh: Mesh) -> int:
    """Tokens of a tile on a mesh's devices, unless others are asked for."""
    return _TILE_OF_CPUS if mesh.devices.flat[0].platform == "cpu" else _TILE


def mlp(
    linears: Linears, x: Float[Array, "R S D"], activation: str, tile: int
) -> Float[Array, "R S D"]:
    """down(activation(gate(x)) * up(x)).

    Args:
        activation: a key of `ACTIVATIONS`, computed in float32.
        tile: tokens that are computed at a time, about, of twice as many at least;
            0: all.
    """
    modules = Modules(
        gate=linears.module("gate", x.dtype),
        up=linears.module("up", x.dtype),
        down=linears.module("down", x.dtype, row=True),
    )
    part = _Part(activation=activation, scale=linears.scale)
    tokens = x.shape[0] * x.shape[1]
    if not tile or tokens < 2 * tile:
        out = part(modules, x, linears.dropout)
    else:
        trained, frozen = _split(modules, adapted=linears.adapter is not None)
        tiles = -(-tokens // tile)
        out = _tiled(part, trained, frozen, x, linears.dropout, tiles)
    return linears.sum_row(out, "down")


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The MLP of some tokens: a part of a sum over `tensor`."""

    activation: str
    scale: float

    def __call__(
        self,
        modules: Modules,
        x: Float[Array, "R S D"],
        dropout: Dropout | None,
        gradients: Modules | None = None,
    ) -> Float[Array, "R S D"]:
        """`gradients`: see `Module`."""
        into = gradients or Modules()

        def product(name: str, x: Array, *, row: bool = False) -> Array:
            dropped = dropping(dropout, name, row=row)
            return getattr(modules, name)(x, self.scale, dropped, getattr(into, name))

        gate = ACTIVATIONS[self.activation](product("gate", x).astype(jnp.float32))
        return product("down", gate.astype(x.dtype) * product("up", x), row=True)


def _split(modules: Modules, *, adapted: bool) -> tuple[Modules, Modules]:
    """What is trained, and what is not: with adapters all but these."""
    if not adapted:
        return modules, Modules()
    adapters = (Module(a=module.a, b=module.b) for module in modules)
    bases = (Module(weight=module.weight, bias=module.bias) for module in modules)
    return Modules(*adapters), Modules(*bases)


def _merged(trained: Modules, frozen: Modules) -> Modules:
    pairs = zip(trained, frozen, strict=True)
    return Modules(
        *(
            Module(*(x if y is None else y for x, y in zip(*pair, strict=True)))
            for pair in pairs
        )
    )


def _tiled(
    part: _Part,
    trained: Modules,
    frozen: Modules,
    x: Float[Array, "R S D"],
    dropout: Dropout | None,
    tiles: int,
) -> Float[Array, "R S D"]:
    """`part` of so many tiles, one after another."""
    R, S, D = x.shape
    tiles, size = block_sizes(R * S, tiles)

    def cut(per_token: Array) -> Array:
        flat = per_token.reshape(1, R * S, *per_token.shape[2:])
        return in_blocks(flat, 1, tiles, size)

    # All vary over the same axes in there: sums over those that a weight does not vary
    # over are autodiff's, out here and once.
    axes = varying_axes(x)
    trained, frozen = jax.tree.map(lambda w: make_varying(w, axes), (trained, frozen))
    out: Array = _over_tiles(
        part,
        None if dropout is None else dropout.rate,
        trained,
        frozen,
        None if dropout is None else dropout.key,
        (cut(x), None if dropout is None else cut(dropout.prefixes)),
    )
    return out_of_blocks(out, 1, R * S).reshape(R, S, D)


def _dropout(rate: float | None, key: Any, prefixes: Array | None) -> Dropout | None:
    if rate is None or prefixes is None:
        return None
    return Dropout(rate=rate, key=key, prefixes=prefixes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _over_tiles(part, rate, trained, frozen, key, tokens):
    modules = _merged(trained, frozen)

    def one(carry: None, tile: tuple[Array, Array | None]) -> Any:
        x, prefixes = tile
        return carry, part(modules, x, _dropout(rate, key, prefixes))

    return lax.scan(one, None, tokens)[1]


def _forward(part, rate, *arguments):
    return _over_tiles(part, rate, *arguments), arguments


def _backward(part, rate, saved, dout):
    trained, frozen, key, tokens = saved
    modules = _merged(trained, frozen)
    zeros = jax.tree.map(lambda w: zeros_like(w).astype(jnp.float32), trained)

    def one(total: Modules, tile: Any) -> Any:
        (x, prefixes), dout = tile

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def run(x: Array, gradients: Modules) -> Array:
            return part(modules, x, _dropout(rate, key, prefixes), gradients)

        dx, more = jax.vjp(run, x, zeros)[1](dout)
        return jax.tree.map(jnp.add, total, more), dx

    total, dx = lax.scan(one, zeros, (tokens, dout))
    dtrained = jax.tree.map(lambda w, dw: dw.astype(w.dtype), trained, total)
    return dtrained, None, None, (dx, None)


_over_tiles.defvjp(_forward, _backward)
