"""Updating stacked parameters a layer at a time.

What an update makes of a whole stack [L, ...] on its way, as moments in float32 where
they are stored in 8 bits, would be the most memory that a step takes; of one layer it
is little. What is new takes the place of what was there, in a loop.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax import lax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from engine.training.matrices import Block, Blocks, block_at

# An operation that is missing here costs memory, never a number: see `is_elementwise`.
_ELEMENTWISE = frozenset(
    "abs add and clamp convert_element_type div eq exp ge gt integer_pow is_finite le "
    "log lt max min mul ne neg not or pow rsqrt select_n sign sqrt square sub".split()
)


def is_elementwise(
    optimizer: optax.GradientTransformation, blocks: Blocks, mesh: Mesh
) -> bool:
    """Whether a number's update follows from its own gradient, state and value alone.

    As the equations of the update say: what looks at whole matrices has others.
    """
    shapes = {path: (2,) * x.stacked + x.shape for path, x in blocks.items()}
    params = {path: jax.ShapeDtypeStruct(x, "float32") for path, x in shapes.items()}

    def update(params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(params, optimizer.init(params), params)

    # On the mesh, since it may have collectives; it is not run.
    one_step = jax.shard_map(
        update, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
    )
    traced = jax.make_jaxpr(one_step)(nnx.State(unflatten_dict(params)))
    (equation,) = traced.eqns
    return all(map(_has_elementwise_only, jaxprs_in_params(equation.params)))


def _has_elementwise_only(jaxpr: Jaxpr) -> bool:
    def suits(equation: JaxprEqn) -> bool:
        name = equation.primitive.name
        if name == "jit":  # no loop, which may be over what it takes
            return all(map(_has_elementwise_only, jaxprs_in_params(equation.params)))
        arrays = [x for x in equation.invars if x.aval.ndim]  # pyright: ignore
        results = [x for x in equation.outvars if x.aval.ndim]  # pyright: ignore
        if not arrays:  # of scalars: another one, or an array of the same everywhere
            return not results or name == "broadcast_in_dim"
        return name in _ELEMENTWISE

    return all(map(suits, jaxpr.eqns))


def by_layer[State](
    function: Callable[[State, Any, Array | None], State],
    state: State,
    given: Any,
    blocks: Blocks,
) -> State:
    """`function(state, given, None)`, computed a layer of all stacks at a time.

    For functions of single numbers. `function` is called for each layer, in a loop,
    with stacks of that layer alone, and once, with `None`, for all else, as counts are:
    so they go up once. What a call is not for has no rows.

    Args:
        state: what changes.
        given: what does not, of the same parameters.
    """
    paths, leaves = zip(*jax.tree.leaves_with_path(state), strict=True)
    structure = jax.tree.structure(state)
    stacked = [_is_stacked(block_at(blocks, path)) for path in paths]

    def joined(stacks: Any, others: Any) -> list[Array]:
        found = iter(stacks)
        pairs = zip(stacked, others, strict=True)
        return [next(found) if is_stack else x for is_stack, x in pairs]

    def stacks_of(leaves: Any) -> list[Array]:
        return [x for x, is_stack in zip(leaves, stacked, strict=True) if is_stack]

    def one_layer(layer: Array, stacks: list[Array]) -> list[Array]:
        old = structure.unflatten(joined(stacks, leaves))
        parts = _parts((old, given), blocks, layer)
        # Read once, before anything is written: else XLA copies whole stacks, to read
        # them again where it computes something anew.
        old, own = lax.optimization_barrier(parts)
        new = stacks_of(jax.tree.leaves(function(old, own, layer)))
        pairs = zip(stacks, new, strict=True)
        return [lax.dynamic_update_slice_in_dim(x, y, layer, 0) for x, y in pairs]

    stacks = stacks_of(leaves)
    (layers,) = {x.shape[0] for x in stacks}
    done = lax.fori_loop(0, layers, one_layer, stacks)
    others = jax.tree.leaves(function(*_parts((state, given), blocks, None), None))
    return structure.unflatten(joined(done, others))


def _is_stacked(block: Block | None) -> bool:
    return block is not None and block.stacked


def _parts[Tree](tree: Tree, blocks: Blocks, layer: Array | None) -> Tree:
    """Of stacks a layer and of other parameters nothing; or with `None` the reverse."""

    def part(path: Any, x: Array) -> Array:
        block = block_at(blocks, path)
        if block is None or (layer is None and not block.stacked):
            return x
        if layer is None or not block.stacked:
            return x[:0]
        return lax.dynamic_slice_in_dim(x, layer, 1)

    return jax.tree_util.tree_map_with_path(part, tree)
