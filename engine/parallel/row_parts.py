"""Rows whose tokens are spread over the devices along `sequence`; inside `shard_map`.

A row is cut into 2C pieces for C devices, of which device c has piece c and piece
2C-1-c, one after the other. A token sees what lies before it, so that all devices have
as much to attend to. What the host makes of a row (numbers of its tokens) is whole on
every device, and cut here; only what is computed of tokens is spread.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from engine.parallel.batch import KeySpans
from engine.parallel.sharding import SEQUENCE


@dataclass(frozen=True)
class RowParts:
    """How rows of `length` tokens are spread over so many devices."""

    length: int
    devices: int

    @classmethod
    def of(cls, length: int) -> "RowParts":
        """That of the mesh that is being traced."""
        return cls(length, lax.axis_size(SEQUENCE))

    @property
    def piece(self) -> int:
        """Tokens of a piece."""
        return -(-self.length // (2 * self.devices))

    @property
    def padded(self) -> int:
        """Tokens of a row, and what makes it so many whole pieces."""
        return self.length if self.devices == 1 else 2 * self.devices * self.piece

    @property
    def size(self) -> int:
        """Tokens of a device's part."""
        return self.padded // self.devices

    def _pieces(self) -> tuple[Array, Array]:
        """The numbers of this device's."""
        number = lax.axis_index(SEQUENCE)
        return number, 2 * self.devices - 1 - number

    @property
    def starts(self) -> tuple[Array | int, ...]:
        """Where the runs of tokens that this device has of a row begin in it."""
        if self.devices == 1:
            return (0,)
        return tuple(number * self.piece for number in self._pieces())

    def pad(
        self, tokens: Int[np.ndarray | Array, "R S"], spans: KeySpans | None
    ) -> tuple[Any, KeySpans | None]:
        """Rows of whole pieces, whose padding sees itself alone."""
        more = self.padded - self.length
        if not more:
            return tokens, spans
        tokens = jnp.pad(tokens, ((0, 0), (0, more)))
        if spans is None:
            return tokens, None
        rest = jnp.arange(self.length, self.padded, dtype=jnp.int32)
        rest = jnp.broadcast_to(rest, (tokens.shape[0], more))
        whole = (jnp.concatenate([x, rest], axis=1) for x in spans)
        return tokens, KeySpans(*whole)

    def own[T](self, tree: T) -> T:
        """This device's part of whole rows [R, padded]."""
        if self.devices == 1:
            return tree

        def cut(x: Array) -> Array:
            pieces = x.reshape(x.shape[0], 2 * self.devices, self.piece)
            own = jnp.take(pieces, jnp.stack(self._pieces()), axis=1, mode="clip")
            return own.reshape(x.shape[0], self.size)

        return jax.tree.map(cut, tree)

    def find(
        self, positions: Int[Array, " T"]
    ) -> tuple[Int[Array, " T"], Bool[Array, " T"]]:
        """Flat positions in whole rows, as such in this device's part; if they are."""
        row, column = positions // self.length, positions % self.length
        number, within = column // self.piece, column % self.piece
        last = number >= self.devices
        device = jnp.where(last, 2 * self.devices - 1 - number, number)
        within += jnp.where(last, self.piece, 0)
        return row * self.size + within, device == lax.axis_index(SEQUENCE)

    def sum_scatter(self, x: Float[Array, "R S D"]) -> Float[Array, "R s D"]:
        """Of whole rows the sum over the devices, each of which gets its part."""
        if self.devices == 1:
            return x
        pieces = x.reshape(x.shape[0], 2 * self.devices, self.piece, *x.shape[2:])
        first, last = pieces[:, : self.devices], pieces[:, : self.devices - 1 : -1]
        x = jnp.stack([first, last], axis=2).reshape(x.shape)
        return lax.psum_scatter(x, SEQUENCE, scatter_dimension=1, tiled=True)

    def gather(self, x: Float[Array, "R s *more"]) -> Float[Array, "R S *more"]:
        """Whole rows, of every device's part."""
        if self.devices == 1:
            return x
        whole = lax.all_gather(x, SEQUENCE, axis=1, tiled=True)
        shape = x.shape[0], self.devices, 2, self.piece, *x.shape[2:]
        pieces = whole.reshape(shape)
        order = jnp.concatenate([pieces[:, :, 0], pieces[:, ::-1, 1]], axis=1)
        return order.reshape(whole.shape)


def spread_rows(x: Float[Array, "T D"], own: Bool[Array, " T"]) -> Array:
    """Of rows each of which one device along `sequence` has, an equal share each.

    In their order, those at the end filled up with zeros: [even_size(T) / C, D].
    """
    devices = lax.axis_size(SEQUENCE)
    if devices == 1:
        return x
    x = jnp.where(own[:, None], x, jnp.zeros((), x.dtype))
    x = jnp.pad(x, ((0, even_size(x.shape[0]) - x.shape[0]), (0, 0)))
    return lax.psum_scatter(x, SEQUENCE, scatter_dimension=0, tiled=True)


def even_size(size: int) -> int:
    """The least multiple of the devices along `sequence` that is not below."""
    devices = lax.axis_size(SEQUENCE)
    return -(-size // devices) * devices
