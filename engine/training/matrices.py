"""Optimizers that look at whole matrices, on shards of them: Adafactor and Muon.

A stacked parameter [L, out, in] is L matrices, each an optimizer's block of its own,
and rows that pad the vocabulary belong to none. Both give on every mesh what one device
gives, to the rounding of sums. Inside `shard_map` alone.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from engine.models import DecoderConfig
from engine.parallel.collectives import axes_of
from engine.parallel.sharding import (
    ADAPTERS,
    AXES,
    ParameterPath,
    Role,
    parameter_spec,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """What an optimizer must know of one parameter."""

    shape: tuple[int, ...]  # of one block: a matrix [out, in] or a vector
    spec: P  # of the whole parameter, with an entry for each axis
    stacked: bool  # its first axis counts blocks
    decayed: bool
    orthogonalized: bool  # by Muon

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows and columns."""
        return len(self.shape) == 2

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of one block."""
        return tuple(range(-len(self.shape), 0))

    def sum(self, x: Array, *axes: int) -> Array:
        """Over whole axes (negative numbers), which stay with length 1."""
        names = [n for axis in axes for n in axes_of(P(self.spec[axis]))]
        total = jnp.sum(x, axis=axes, keepdims=True)
        return lax.psum(total, tuple(names)) if names else total

    def mean(self, x: Array, *axes: int) -> Array:
        """Over whole axes; rows that pad the vocabulary must be 0, and do not count."""
        return self.sum(x, *axes) / math.prod(self.shape[axis] for axis in axes)


Blocks = Mapping[ParameterPath, Block]


def parameter_blocks(decoder: DecoderConfig, mesh: Mesh) -> Blocks:
    """For each parameter that is trained."""
    matrices = {Role.COLUMN, Role.KV_COLUMN, Role.ROW, *ADAPTERS}
    blocks = {}
    for path, parameter in decoder.parameters().items():
        if not parameter.trainable:
            continue
        spec = parameter_spec(parameter, decoder, mesh)
        entries = len(parameter.shape) + parameter.stacked
        blocks[path] = Block(
            shape=parameter.shape,
            spec=P(*spec, *[None] * (entries - len(spec))),
            stacked=parameter.stacked,
            decayed=parameter.role in matrices | {Role.VOCAB},
            orthogonalized=parameter.role in matrices,
        )
    return blocks


def block_at(blocks: Blocks, path: Any) -> Block | None:
    """That of the parameter which a path ends with, or None where it ends with none."""
    keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    return next(
        (blocks[keys[i:]] for i in range(len(keys)) if keys[i:] in blocks), None
    )


def _map_blocks(
    function: Callable[..., Any], blocks: Blocks, tree: Any, *more: Any
) -> Any:
    """`function(block, x, ...)` for each parameter that `tree` has."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *x: function(block_at(blocks, path), *x), tree, *more
    )


class AdafactorState(NamedTuple):
    """The second moment of a matrix is v_row * v_col / mean(v_row)."""

    steps: Int[Array, ""]
    v_row: Any  # of a matrix [..., out, 1]; of a vector its whole second moment
    v_col: Any  # of a matrix [..., 1, in]; of a vector one number that nothing reads


class _Factored(NamedTuple):
    """The update of one parameter and what follows of its state."""

    update: Array
    v_row: Array
    v_col: Array


def scale_by_adafactor(
    blocks: Blocks,
    *,
    decay_exponent: float = 0.8,
    epsilon: float = 1e-30,
    clip_threshold: float = 1.0,
) -> optax.GradientTransformation:
    """Gradients over the root of factored second moments, clipped by each block's RMS.

    The second moment decays by 1 - t**-0.8 at step t, counted from 1. As transformers'
    Trainer has Adafactor: no first moment, steps not scaled by the parameter's size.
    Source: Shazeer and Stern 2018, arXiv:1804.04235, algorithm 4.
    """

    def init(params: Any) -> AdafactorState:
        def rows(block: Block, x: Array) -> Array:
            shape = (*x.shape[:-1], 1) if block.is_matrix else x.shape
            return jnp.zeros(shape, jnp.float32)

        def columns(block: Block, x: Array) -> Array:
            lead = x.shape[:-2] if block.is_matrix else (1,) * (x.ndim - 1)
            tail = (1, x.shape[-1]) if block.is_matrix else (1,)
            return jnp.zeros((*lead, *tail), jnp.float32)

        return AdafactorState(
            steps=jnp.int32(0),
            v_row=_map_blocks(rows, blocks, params),
            v_col=_map_blocks(columns, blocks, params),
        )

    def update(
        grads: Any, state: AdafactorState, params: Any = None
    ) -> tuple[Any, AdafactorState]:
        del params
        count = state.steps + 1
        decay = 1.0 - count.astype(jnp.float32) ** -decay_exponent

        def one(block: Block, grad: Array, v_row: Array, v_col: Array) -> _Factored:
            squares = jnp.square(grad) + epsilon
            if block.is_matrix:
                v_row = decay * v_row + (1 - decay) * block.mean(squares, -1)
                v_col = decay * v_col + (1 - decay) * block.mean(squares, -2)
                # Rows without a gradient must not divide it by 0.
                share = jnp.maximum(v_row / block.mean(v_row, -2), _LEAST)
                scaled = grad * lax.rsqrt(share) * lax.rsqrt(v_col)
            else:
                v_row = decay * v_row + (1 - decay) * squares
                scaled = grad * lax.rsqrt(v_row)
            rms = jnp.sqrt(block.mean(jnp.square(scaled), *block.axes))
            scaled = scaled / jnp.maximum(1.0, rms / clip_threshold)
            return _Factored(scaled, v_row, v_col)

        found = _map_blocks(one, blocks, grads, state.v_row, state.v_col)

        def pick(name: str) -> Any:
            return jax.tree.map(
                lambda x: getattr(x, name),
                found,
                is_leaf=lambda x: isinstance(x, _Factored),
            )

        new = AdafactorState(count, pick("v_row"), pick("v_col"))
        return pick("update"), new

    return optax.GradientTransformation(init, update)  # pyright: ignore


_LEAST = 1e-37  # a normal float32, whose root's inverse is finite

# The quintic whose repeated use takes singular values in (0, 1] to about 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class MuonState(NamedTuple):
    """Momentum, sharded as the parameters are."""

    steps: Int[Array, ""]
    mu: Any


def orthogonalized_momentum(
    blocks: Blocks, *, beta: float, match_rms: float | None, mu_dtype: str | None
) -> optax.GradientTransformation:
    """Nesterov's momentum of each matrix, with all its singular values about 1.

    Newton-Schulz takes whole matrices: each device is sent some layers' of them, and
    sends what becomes of them back. `match_rms` and None: see `DPOConfig`.
    Source: optax.contrib.muon, whose updates these are on one device; K. Jordan 2024;
    Liu et al. 2025, arXiv:2502.16982 (the scale).
    """

    def init(params: Any) -> MuonState:
        zeros = optax.tree.zeros_like(params, dtype=mu_dtype)
        return MuonState(jnp.int32(0), zeros)

    def update(
        grads: Any, state: MuonState, params: Any = None
    ) -> tuple[Any, MuonState]:
        del params
        count = state.steps + 1
        t = count.astype(jnp.float32)
        mu = jax.tree.map(
            lambda g, m: beta * m.astype(jnp.float32) + (1 - beta) * g, grads, state.mu
        )
        ahead = beta / (1 - beta ** (t + 1)), (1 - beta) / (1 - beta**t)

        def one(block: Block, grad: Array, m: Array) -> Array:
            rows, columns = block.shape
            scale = math.sqrt(max(1, rows / columns))
            if match_rms is not None:
                scale = match_rms * math.sqrt(max(rows, columns))
            moved = ahead[0] * m + ahead[1] * grad
            return scale * on_whole_matrices(orthogonalize, moved, block.spec)

        new = MuonState(count, optax.tree.cast(mu, mu_dtype))
        return _map_blocks(one, blocks, grads, mu), new

    return optax.GradientTransformation(init, update)  # pyright: ignore


def orthogonalize(x: Float[Array, "L O I"]) -> Float[Array, "L O I"]:
    """U V' of each matrix U S V', roughly: singular values within about 0.7 and 1.2."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8)
    one, three, five = _QUINTIC
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = one * x + (three * square + five * square @ square) @ x
    return x


def on_whole_matrices(
    function: Callable[[Array], Array], x: Float[Array, "L o i"], spec: P
) -> Float[Array, "L o i"]:
    """`function` of whole matrices [l, out, in], of which each device does some layers.

    `function` must take zeros, which fill up the last layers, to anything finite.
    """
    layers, sharded = x.shape[0], axes_of(spec)
    copied = tuple(axis for axis in AXES if axis not in sharded)
    devices = math.prod(lax.axis_size(axis) for axis in AXES)
    own = -(-layers // devices)
    x = jnp.pad(x, ((0, own * devices - layers), (0, 0), (0, 0)))
    # Devices that hold the same take a part each.
    parts = math.prod(lax.axis_size(axis) for axis in copied)
    if copied:
        size = x.shape[0] // parts
        x = lax.dynamic_slice_in_dim(x, lax.axis_index(copied) * size, size, axis=0)
    moves = [(axes_of(P(spec[place])), place) for place in (1, 2) if spec[place]]
    for axes, place in moves:
        x = lax.all_to_all(x, axes, split_axis=0, concat_axis=place, tiled=True)
    x = function(x)
    for axes, place in reversed(moves):
        x = lax.all_to_all(x, axes, split_axis=place, concat_axis=0, tiled=True)
    if copied:
        x = lax.all_gather(x, copied, axis=0, tiled=True, to="invarying")
    return x[:layers]
