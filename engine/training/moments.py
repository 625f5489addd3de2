"""Moments of an optimizer in fewer bits than it computes with: 8, or bfloat16.

They are float32 while they are updated, and rounded up or down at random when they are
stored, right on average. Rounded to nearest, a second moment would never decay: 0.999
of a number that is spaced by 1/16 or more of itself rounds to the number.

An 8-bit number is a small float whose exponent counts from that of its block: a sign
(of first moments), then one code for an exponent and three bits. Blocks of up to 256
numbers are quantised by themselves, as one of them may be large.

    code = n + 8 * shift,   value = n * 2**(shift - steps + exponent of the block)

where every number of the block is below 2**exponent, n is in [8, 16) (below that where
shift is 0, as denormals have it) and `steps` is the code's width in octaves.

Sources: Dettmers et al. 2022, arXiv:2110.02861 (8-bit states, block-wise, of codes with
a wide range); Rouhani et al. 2023, arXiv:2310.10537 (small floats under an exponent
that a block shares). As the exponent is a power of two, a number that does not change
is stored again without an error, also where its block's largest number changes.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int8, UInt8, UInt32

from engine.models.dropout import GOLDEN, mixed, step_key
from engine.parallel.collectives import axes_of
from engine.parallel.sharding import FSDP
from engine.training.matrices import Block, Blocks, block_at

Kept = Literal["float32", "bfloat16", "8bit"]

_LONGEST, _SHORTEST = 256, 4  # blocks: one exponent for so many numbers
_TENSOR_SIZES = 8  # on meshes of which `tensor` divides this blocks are the same
_LOWEST = -90  # of exponents: a step is then 2**-123, which no device flushes to 0
_LARGEST = 127


@dataclass(frozen=True, kw_only=True)
class Code:
    """How a number becomes 8 bits."""

    signed: bool
    steps: int  # 2**exponent is so many octaves above the least difference
    least: int  # the code of the smallest numbers that are not 0


FIRST = Code(signed=True, steps=17, least=0)
# What divides an update never becomes 0: it is rounded up to the least code instead.
SECOND = Code(signed=False, steps=33, least=1)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The blocks of a parameter: so many numbers along one axis."""

    axis: int  # -1 or -2
    length: int

    def split(self, x: Array) -> Array:
        """[..., blocks, numbers, ...]: `axis` counts blocks, as from the front."""
        axis = x.ndim + self.axis
        blocks = x.shape[axis] // self.length
        shape = (*x.shape[:axis], blocks, self.length, *x.shape[axis + 1 :])
        return x.reshape(shape)

    def spread(self, x: Array) -> Array:
        """What there is one of for each block, for each number of it."""
        return jnp.repeat(x, self.length, axis=x.ndim + self.axis)


def tiles_of(block: Block, tensor: int) -> Tiles | None:
    """A parameter's blocks on a mesh, or None where it is kept in float32.

    Norms and biases are, and what would have very short blocks. Blocks lie along an
    axis that `fsdp` does not split, and are short enough for what `tensor` leaves of
    it: so they are whole on every device, and the same on every mesh.
    """
    if not block.is_matrix:
        return None
    found = []
    for axis in (-1, -2):
        length = block.shape[axis]
        if FSDP not in axes_of(P(block.spec[axis])):
            part = length // math.gcd(length, math.lcm(_TENSOR_SIZES, tensor))
            found.append(Tiles(axis=axis, length=math.gcd(part, _LONGEST)))
    best = max(found, key=lambda x: x.length)
    return best if best.length >= _SHORTEST else None


def _power(exponent: Array) -> Array:
    """2.0**exponent, exactly, for exponents of normal float32 numbers."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _octave(x: Array) -> Array:
    """floor(log2(x)) of positive normal numbers, exactly; of 0 it is -127."""
    return (lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def encode(
    x: Float[Array, "..."], bits: UInt32[Array, "..."], code: Code, tiles: Tiles
) -> tuple[UInt8[Array, "..."], Int8[Array, "..."]]:
    """Codes, and the exponents of their blocks.

    The error is below 1/8 of the number or 2**(1 - code.steps) of its block's largest
    one, whichever is more; on average it is 0, but of what `code.least` rounds up.

    Args:
        bits: a random number for each.
    """
    size = jnp.abs(x)
    top = tiles.split(size).max(axis=x.ndim + tiles.axis + 1)
    exponent = jnp.clip(_octave(top) + 1, _LOWEST, _LARGEST)
    size = size * _power(code.steps - tiles.spread(exponent))
    shift = jnp.maximum(_octave(size) - 3, 0)
    # 16 bits at most: so that what needs no rounding is not rounded.
    share = (bits >> 16).astype(jnp.float32) * 2.0**-16
    whole = jnp.floor(size * _power(-shift) + share).astype(jnp.int32)
    found = whole + 8 * shift
    if code.least:
        found = jnp.where(size > 0, jnp.maximum(found, code.least), 0)
    if code.signed:
        found = found | jnp.where(x < 0, 128, 0)
    return found.astype(jnp.uint8), exponent.astype(jnp.int8)


def decode(
    codes: UInt8[Array, "..."], exponents: Int8[Array, "..."], code: Code, tiles: Tiles
) -> Float[Array, "..."]:
    """The numbers, in float32, exactly."""
    found = codes.astype(jnp.int32)
    magnitude = found & 127 if code.signed else found
    shift = jnp.maximum((magnitude >> 3) - 1, 0)
    whole = (magnitude - 8 * shift).astype(jnp.float32) * _power(shift)
    x = whole * _power(tiles.spread(exponents.astype(jnp.int32)) - code.steps)
    return jnp.where(found > 127, -x, x) if code.signed else x


def to_bfloat16(x: Float[Array, "..."], bits: UInt32[Array, "..."]) -> Array:
    """float32 to either neighbour in bfloat16, right on average; x is finite."""
    drawn = (lax.bitcast_convert_type(x, jnp.uint32) + (bits >> 16)) >> 16
    return lax.bitcast_convert_type(drawn.astype(jnp.uint16), jnp.bfloat16)


def random_bits(
    x: Array, block: Block, key: UInt32[Array, " 2"], layer: Array | None = None
) -> UInt32[Array, "..."]:
    """A number for each of a parameter, which is the same on every mesh.

    It follows from where the number is in the whole parameter, of which `x` may be one
    device's shard, and of a stack that `layer` alone.
    """
    index, stride = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        names = axes_of(P(block.spec[axis]))
        first = lax.axis_index(names) * x.shape[axis] if names else jnp.int32(0)
        if layer is not None and block.stacked and axis == 0:
            first = layer
        own = lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        index += (own + first.astype(jnp.uint32)) * jnp.uint32(stride % 2**32)
        stride *= x.shape[axis] * math.prod(lax.axis_size(name) for name in names)
    return mixed(mixed(index * jnp.uint32(GOLDEN) + key[0]) ^ key[1])


class SmallState(NamedTuple):
    """An optimizer's state, its moments as they are stored."""

    steps: Array
    stored: Any  # as the optimizer's own; codes, where they are 8 bits
    exponents: Any  # the same tree; None where there are none


class _Form(NamedTuple):
    """How one array of an optimizer's state is stored."""

    kept: Kept  # float32: as it is
    code: Code
    tiles: Tiles | None


@dataclass(frozen=True, kw_only=True)
class _Storage:
    """How an optimizer's state is stored."""

    blocks: Blocks
    mu: Kept
    nu: Kept
    tensor: int

    def _form(self, path: Any) -> _Form:
        names = {x.name for x in path if isinstance(x, jax.tree_util.GetAttrKey)}
        kept: Kept = "float32"
        if names & {"mu", "trace"} and self.mu == "8bit":
            kept = "8bit"  # in bfloat16 the optimizer itself keeps them
        elif "nu" in names:
            kept = self.nu
        block = block_at(self.blocks, path)
        tiles = block and tiles_of(block, self.tensor)
        return _Form(
            kept if tiles else "float32", SECOND if "nu" in names else FIRST, tiles
        )

    def stored(self, tree: Any, bits_of: Callable[[Any, Array], Array]) -> Any:
        """The arrays and the exponents of their blocks."""

        def store(path: Any, x: Array) -> tuple[Array, Array | None]:
            kept, code, tiles = self._form(path)
            if kept == "float32":
                return x, None
            bits = bits_of(path, x)
            if kept == "bfloat16":
                return to_bfloat16(x, bits), None
            assert tiles is not None
            return encode(x, bits, code, tiles)

        pairs = [store(*leaf) for leaf in jax.tree.leaves_with_path(tree)]
        structure = jax.tree.structure(tree)
        return [structure.unflatten([pair[i] for pair in pairs]) for i in (0, 1)]

    def restored(self, state: SmallState) -> Any:
        """The state as the optimizer knows it."""

        def restore(path: Any, x: Array, exponents: Array | None) -> Array:
            kept, code, tiles = self._form(path)
            if exponents is None:
                return x.astype(jnp.float32) if kept == "bfloat16" else x
            assert tiles is not None
            return decode(x, exponents, code, tiles)

        return jax.tree_util.tree_map_with_path(restore, state.stored, state.exponents)


def with_small_moments(
    optimizer: optax.GradientTransformation,
    blocks: Blocks,
    *,
    mu: Kept,
    nu: Kept,
    tensor: int,
    seed: int,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, with its moments of matrices and embeddings stored so.

    Its update may be given one `layer` of all stacks, and rounds as in the whole then.

    Args:
        mu: of first moments, which in bfloat16 are so in the optimizer already.
        tensor: the size of that axis of the mesh.
        seed: of the rounding.
    """
    storage = _Storage(blocks=blocks, mu=mu, nu=nu, tensor=tensor)

    def init(params: Any) -> SmallState:
        def no_bits(path: Any, x: Array) -> Array:
            del path
            return jnp.zeros(x.shape, jnp.uint32)

        # Not known to the compiler, which else computes the codes of whole stacks of
        # zeros itself, for minutes.
        zero = lax.optimization_barrier(jnp.float32(0.0))
        start = jax.tree.map(lambda x: x + zero.astype(x.dtype), optimizer.init(params))
        found = storage.stored(start, no_bits)
        return SmallState(jnp.int32(0), *found)

    def update(
        grads: Any,
        state: SmallState,
        params: Any = None,
        *,
        layer: Array | None = None,
        **more: Any,
    ) -> tuple[Any, SmallState]:
        del more  # as optax asks for
        updates, new = optimizer.update(grads, storage.restored(state), params)
        key = step_key(seed, state.steps)

        def bits_of(path: Any, x: Array) -> Array:
            block = block_at(blocks, path)
            assert block is not None
            name = zlib.crc32(jax.tree_util.keystr(path).encode())
            own = jax.random.fold_in(key, name)
            return random_bits(x, block, jax.random.key_data(own), layer)

        return updates, SmallState(state.steps + 1, *storage.stored(new, bits_of))

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore
