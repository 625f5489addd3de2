"""Loops over blocks of rows and chunks of the vocabulary, and their carries' types.

Trip counts may be traced: padding rows are skipped at run time. Such loops cannot be
differentiated by JAX, and need not be: the op brings its own vjp.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

Carry = Any


def for_each_chunk(
    first: int,
    last: int,
    chunk: int,
    body: Callable[[Any, int, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Fold `body(start, length, carry)` over [first, last) in order.

    `start` is traced, except in the shorter last chunk, which has code of its own: so
    no chunk reads past the end, and none is masked or computed twice.
    """
    whole, tail = divmod(last - first, chunk)
    if whole == 1:
        carry = body(first, chunk, carry)
    elif whole > 1:
        carry = lax.fori_loop(
            0, whole, lambda i, c: body(first + i * chunk, chunk, c), carry
        )
    if tail:
        carry = body(first + whole * chunk, tail, carry)
    return carry


def for_each_row_block(
    num_rows: int,
    block: int,
    num_valid: Int[Array, ""] | None,
    body: Callable[[Any, Bool[Array, " block"], Carry], Carry],
    carry: Carry,
) -> Carry:
    """Fold `body(start, fresh, carry)` over the blocks that hold a valid row.

    Every block has `block` rows: the last one is moved back to end at `num_rows`.
    `fresh` is False for the rows that the block before it has done, and for padding.
    """
    block = min(block, num_rows)
    valid = jnp.int32(num_rows) if num_valid is None else num_valid.astype(jnp.int32)

    def step(i: Any, carry: Carry) -> Carry:
        start = jnp.minimum(i * block, num_rows - block)
        rows = start + jnp.arange(block, dtype=jnp.int32)
        return body(start, (rows >= i * block) & (rows < valid), carry)

    if block == num_rows:
        return step(jnp.int32(0), carry)
    # min: a num_valid above the capacity must not run blocks that do not exist.
    blocks = (jnp.minimum(valid, num_rows) + (block - 1)) // block
    return lax.fori_loop(jnp.int32(0), blocks, step, carry)


def take_rows(x: Array, start: Any, length: int) -> Array:
    """x[start : start + length] for a traced start inside the bounds."""
    return lax.dynamic_slice_in_dim(x, start, length, axis=0)


def uninitialized(shape: tuple[int, ...], dtype: Any, axes: frozenset[str]) -> Array:
    """An array to be written before it is read, typed as varying over `axes`."""
    return make_varying(lax.empty(shape, dtype), axes)


def put_rows(x: Array, update: Array, start: Any) -> Array:
    """`x` with its rows from a traced start replaced, in place inside a loop."""
    return lax.dynamic_update_slice_in_dim(x, update, start, axis=0)


def valid_rows(num_valid: Int[Array, ""] | None, T: int) -> Int[Array, "1"]:
    """How many of T rows are not padding, as a kernel's operand."""
    valid = jnp.full((), T, jnp.int32) if num_valid is None else num_valid
    return jnp.clip(valid.astype(jnp.int32), 0, T)[None]


def varying_axes(*xs: Array | None) -> frozenset[str]:
    """The manual mesh axes over which any of `xs` is typed as varying."""
    types = [jax.typeof(x).manual_axis_type for x in xs if x is not None]
    return frozenset().union(*(t.varying for t in types))


def make_varying(x: Array, axes: frozenset[str]) -> Array:
    """`x` typed as varying over `axes` too; its gradient is then summed over them.

    A loop's carry must start with the type that its body returns.
    """
    missing = axes - varying_axes(x)
    return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def varying_alike(*xs: Array | None) -> tuple[Any, ...]:
    """`xs` typed as varying over the same axes, as a kernel's operands have to be."""
    axes = varying_axes(*xs)
    return tuple(None if x is None else make_varying(x, axes) for x in xs)


def result_like(x: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """A kernel's result that varies over the manual mesh axes that `x` varies over."""
    kind = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)
