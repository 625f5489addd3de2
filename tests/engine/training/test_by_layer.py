"""Stacks that are updated a layer at a time: the same numbers, and little memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.random import threefry_2x32

from engine.parallel.sharding import place
from engine.training.by_layer import is_elementwise
from engine.training.matrices import parameter_blocks, scale_by_adafactor
from engine.training.optimizer import make_optimizer, uniform
from engine.training.step import opt_state_specs, split_model, split_specs
from tests.engine.tiny_models import equations, mesh_of, tiny_config, tiny_model
from tests.engine.training.optimizer_runs import CONFIG, STEPS, gradients, settings

KEPT = {"mu_dtype": "8bit"}
BOTH = KEPT | {"nu_dtype": "8bit"}


class Update:
    """An optimizer's, of a small model on a mesh."""

    def __init__(
        self, name, sizes, *, layered, config: Any = CONFIG, dtype="float32", **more
    ):
        self.mesh = mesh_of(sizes)
        self.model = tiny_model(config, self.mesh)
        self.optimizer = make_optimizer(settings(name, **more), config, self.mesh, 9)
        assert self.optimizer.layered is not None
        if not layered:
            self.optimizer = dataclasses.replace(self.optimizer, layered=None)
        params, specs = split_model(self.model)[1], split_specs(self.model)[0]
        self.params = jax.tree.map(lambda x: x.astype(dtype), params)
        of_state = opt_state_specs(self.optimizer, self.params, specs)
        self.shardings = jax.tree.map(lambda x: place(x, self.mesh), of_state)

        def update(params, state, grads, usable):
            given = {"factor": jnp.float32(0.7), "usable": usable}
            key = jax.random.fold_in(jax.random.key(5), state.steps)
            return self.optimizer.update(grads, state, params, key, **given)

        given: Any = (specs, of_state, specs, jax.P())
        self.function = jax.shard_map(
            update, mesh=self.mesh, in_specs=given, out_specs=given[:2]
        )

    def run(self, *usable):
        """The parameters and the state at first and after each step."""
        init = jax.jit(self.optimizer.init, out_shardings=self.shardings)
        found = [(self.params, init(self.params))]
        step = jax.jit(self.function)
        for number, is_usable in enumerate(usable):
            grads = gradients(self.model, number)
            found.append(step(*found[-1], grads, jnp.bool(is_usable)))
        return jax.device_get(found)

    def arguments(self):
        """Shapes of what an update is given."""
        state = jax.eval_shape(self.optimizer.init, self.params)
        usable = jax.ShapeDtypeStruct((), "bool")
        grads = jax.tree.map(lambda x: x.astype("float32"), self.params)
        return self.params, state, grads, usable


def assert_equal(got, want):
    for (path, x), y in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name, kept", [("adamw", BOTH), ("lion", KEPT), ("sgd", KEPT)])
def test_numbers_are_those_of_whole_stacks(name, kept, dtype):
    """Bit for bit, with what is drawn at random and what counts steps."""
    found = [
        Update(name, (2, 2, 2), layered=layered, dtype=dtype, **kept).run(True, True)
        for layered in (True, False)
    ]
    assert_equal(*found)
    _, state = found[0][-1]
    assert state.steps == 2
    counts = [x for x in jax.tree.leaves(state.stored) if not np.ndim(x)]
    assert counts == [2] * len(counts)


def test_what_is_not_usable_changes_nothing():
    first, second = Update("adamw", (1, 2, 2), layered=True, **BOTH).run(True, False)[
        1:
    ]
    assert_equal(second, first)


def test_optimizers_that_look_at_whole_matrices_are_known():
    mesh = mesh_of((1, 2, 2))
    blocks = parameter_blocks(CONFIG, mesh)
    for name, want in {"adamw": True, "lion": True, "sgd": True, "muon": False}.items():
        found = make_optimizer(settings(name, **KEPT), CONFIG, mesh, STEPS)
        assert (found.layered is not None) == want, name
    assert not is_elementwise(scale_by_adafactor(blocks), blocks, mesh)
    # A loop may carry something from layer to layer.
    in_a_loop = optax.stateless_with_tree_map(lambda g, _: jax.lax.map(jnp.negative, g))
    assert not is_elementwise(in_a_loop, blocks, mesh)


def test_no_stack_is_computed_whole():
    """Of bfloat16 parameters, so that a float32 stack is of moments or updates."""
    # Of smaller matrices the blocks are too short: they keep float32 moments.
    config = tiny_config("qwen3", num_key_value_heads=8, intermediate_size=64)
    more: Any = BOTH | {"config": config, "dtype": "bfloat16"}

    def wide_stacks(layered):
        update = Update("adamw", (1, 2, 2), layered=layered, **more)
        traced = jax.make_jaxpr(update.function)(*update.arguments())
        results = [x.aval for one in equations(traced.jaxpr) for x in one.outvars]
        stacks = [x for x in results if x.ndim > 2 and x.shape[0] == config.num_layers]
        return {x.dtype.name for x in stacks if x.dtype.itemsize == 4}

    assert wide_stacks(layered=False) == {"float32", "uint32", "int32"}
    assert not wide_stacks(layered=True)


def test_the_compiler_copies_no_stack_either():
    """Temporaries are a fraction of one stack in float32, of which there are seven."""
    config = tiny_config("llama", num_hidden_layers=64)
    update = Update("adamw", (1, 1, 1), layered=True, config=config, **BOTH)
    step = jax.jit(update.function, donate_argnums=(0, 1))
    memory: Any = step.lower(*update.arguments()).compile().memory_analysis()
    stack = max(x.nbytes for x in jax.tree.leaves(update.params))
    assert memory.temp_size_in_bytes < stack / 2


def test_a_layer_is_drawn_as_in_its_stack():
    key = jax.random.key(3)
    whole = jax.random.uniform(key, (5, 7, 9))
    for layer in range(5):
        drawn = uniform(key, (1, 7, 9), jnp.int32(layer))
        np.testing.assert_array_equal(drawn, whole[layer : layer + 1])


def test_places_of_more_than_32_bits_are_drawn_for():
    """2**32 is in the middle of this layer."""
    key, shape, layer = jax.random.key(3), (1, 1000, 1000), 4294
    drawn = np.asarray(uniform(key, shape, jnp.int32(layer))).ravel()
    for place_of in (0, 967_295, 967_296, 999_999):
        high, low = divmod(layer * 1_000_000 + place_of, 2**32)
        words = jnp.array([high, low], jnp.uint32)
        one, other = map(int, threefry_2x32(jax.random.key_data(key), words))
        assert drawn[place_of] == ((one ^ other) >> 9) / 2**23
