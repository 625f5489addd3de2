"""Updates of a small model's parameters by any optimizer, on any mesh."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from engine.config.dpo import DPOConfig
from engine.parallel.sharding import place, stored_shape
from engine.training.optimizer import make_optimizer
from engine.training.step import opt_state_specs, split_model, split_specs
from tests.engine.tiny_models import mesh_of, tiny_config, tiny_model, vocab_rows

# Biases, norms and untied head, a vocabulary (101) that every mesh pads.
CONFIG = tiny_config("qwen3")
EPS = float(np.finfo(np.float32).eps)
KINDS: dict[str, Any] = {
    "adamw": {},
    "lion": {"lion_beta1": 0.8},
    "adafactor": {},
    "sgd": {"sgd_momentum": 0.9, "sgd_nesterov": True},
    "muon": {"muon_match_rms": None},
}
STEPS = 2


def settings(name: Any, **more) -> DPOConfig:
    return DPOConfig(
        optimizer=name,
        learning_rate=0.01,
        weight_decay=0.3,
        lr_scheduler_type="constant",
        **KINDS[name] | more,
    )


def gradients(model, step):
    """Seeded numbers, the same on every mesh; 0 where the vocabulary is padded."""
    table = CONFIG.parameters()

    def draw(path, x):
        one = table[tuple(key.key for key in path[:-1])]
        rng = np.random.default_rng((step, len(str(path)), *map(ord, str(path))))
        true = x.shape[: x.ndim - len(one.shape)] + one.shape
        drawn = rng.standard_normal(true).astype(np.float32)
        pads = [(0, n - m) for n, m in zip(x.shape, true, strict=True)]
        assert x.shape == stored_shape(one, CONFIG, model.mesh)
        return jax.device_put(np.pad(drawn, pads), x.sharding)

    return jax.tree_util.tree_map_with_path(draw, split_model(model)[1])


def moved(config, sizes):
    """The parameters after two updates on a mesh, and the state's arrays."""
    mesh = mesh_of(sizes)
    model = tiny_model(CONFIG, mesh)
    params, specs = split_model(model)[1], split_specs(model)[0]
    optimizer = make_optimizer(config, CONFIG, mesh, STEPS)
    state_specs = opt_state_specs(optimizer, params, specs)
    shardings = jax.tree.map(lambda spec: place(spec, mesh), state_specs)
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)

    def update(params, state, grads):
        return optimizer.update(grads, state, params, jax.random.key(0))

    step = jax.jit(
        jax.shard_map(
            update,
            mesh=mesh,
            in_specs=(specs, state_specs, specs),
            out_specs=(specs, state_specs),
        )
    )
    for number in range(STEPS):
        params, state = step(params, state, gradients(model, number))
    assert [x.sharding for x in jax.tree.leaves(state)] == jax.tree.leaves(shardings)
    found = vocab_rows(nnx.to_pure_dict(jax.device_get(params)), CONFIG.vocab_size)
    return found, state


def assert_near(got, want, rel):
    """To `rel` of the largest number of each parameter."""
    for (path, x), y in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert x.shape == y.shape, path
        np.testing.assert_allclose(
            x, y, rtol=0, atol=rel * np.abs(y).max(), err_msg=str(path)
        )
