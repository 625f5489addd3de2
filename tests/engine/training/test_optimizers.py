"""Every optimizer gives on every mesh what its source gives on one device."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from engine.config.dpo import DPOConfig
from engine.errors import InputError
from engine.parallel.sharding import make_mesh, place
from engine.training.matrices import parameter_blocks, scale_by_adafactor
from engine.training.optimizer import make_optimizer
from engine.training.schedules import check_schedule, learning_rate_schedule
from engine.training.step import split_model
from tests.engine.tiny_models import tiny_model
from tests.engine.training.optimizer_runs import (
    CONFIG,
    EPS,
    KINDS,
    STEPS,
    assert_near,
    gradients,
    moved,
    settings,
)

RECORDED = json.loads(
    (Path(__file__).parents[2] / "fixtures" / "optimizers.json").read_text()
)


@functools.cache
def moved_on_one_device(name):
    return moved(settings(name), (1, 1, 1))[0]


def peer(name):
    """optax's own optimizer on the whole arrays of one device."""
    table = CONFIG.parameters()
    model = tiny_model(CONFIG, make_mesh(1, 1, 1, devices=jax.devices()[:1]))

    def tree(value):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: value(table[tuple(key.key for key in path[:-1])]),
            split_model(model)[1],
        )

    decayed = tree(lambda one: len(one.shape) == 2)
    if name == "adamw":
        optimizer = optax.adamw(0.01, weight_decay=0.3, mask=decayed)
    elif name == "lion":
        optimizer = optax.lion(0.01, b1=0.8, weight_decay=0.3, mask=decayed)
    elif name == "sgd":
        decay = optax.add_decayed_weights(0.3, decayed)
        optimizer = optax.chain(decay, optax.sgd(0.01, 0.9, nesterov=True))
    else:
        # [L, out, in]: a matrix times [in] gives [out].
        matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1)
        optimizer = optax.contrib.muon(
            0.01,
            weight_decay=0.3,
            adam_weight_decay=0.3,
            weight_decay_mask=decayed,
            muon_weight_dimension_numbers=tree(
                lambda one: matrix if one.stacked and len(one.shape) == 2 else None
            ),
        )
    params = split_model(model)[1]
    with jax.numpy_dtype_promotion("standard"):
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for number in range(STEPS):
            updates, state = update(gradients(model, number), state, params)
            params = optax.apply_updates(params, updates)
    return nnx.to_pure_dict(jax.device_get(params))


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_updates_are_those_of_optax(name):
    assert_near(moved_on_one_device(name), peer(name), 4 * EPS)


def test_muon_is_that_of_optax():
    """All but the layers' matrices by AdamW (optax has Nesterov's momentum there)."""
    got, want = moved_on_one_device("muon"), peer("muon")
    adamw = moved_on_one_device("adamw")
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        # Five steps of a quintic, whose slope at 0 is 3.4445, on what is rounded.
        assert_near(got["layers"][name], want["layers"][name], 3.4445**5 * EPS)
    for name in ("embed", "head", "final_norm"):
        assert_near(got[name], adamw[name], 4 * EPS)
    for name in ("attn_norm", "q_norm", "q_bias"):
        assert_near(got["layers"][name], adamw["layers"][name], 4 * EPS)


MESHES = [
    *((name, (2, 2, 1)) for name in KINDS),
    *((name, (1, 2, 2)) for name in KINDS),
    # Matrices over two axes at once.
    ("muon", (1, 2, 1, 2)),
    # Two kv heads for four devices, which so hold whole copies of them.
    ("adafactor", (1, 1, 4)),
    ("muon", (1, 1, 4)),
]


@pytest.mark.parametrize("name, sizes", MESHES)
def test_updates_are_the_same_on_every_mesh(name, sizes):
    got, state = moved(settings(name), sizes)
    # Muon's rounding grows through five steps of its quintic.
    assert_near(got, moved_on_one_device(name), (500 if name == "muon" else 8) * EPS)
    if name == "adafactor" and sizes == (1, 2, 2):
        rows = state[0].v_row["layers"]["o"][...]
        assert rows.shape == (3, 32, 1)
        columns = state[0].v_col["layers"]["o"][...]
        assert columns.shape == (3, 1, 64)
        assert columns.sharding == place(P(None, None, "tensor"), columns.sharding.mesh)


@pytest.mark.parametrize("shape, want", RECORDED["adafactor"])
def test_adafactor_is_that_of_transformers(shape, want):
    """Its matrices are factored from any size on, and clipped one by one."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    name = "o" if len(shape) == 2 else "attn_norm"
    whole = parameter_blocks(CONFIG, mesh)["layers", name]
    block = dataclasses.replace(whole, shape=tuple(shape), spec=P(None, None, None))
    optimizer = scale_by_adafactor({("x",): block})

    def wave(step):
        return np.sin(1.7 * np.arange(math.prod(shape)) + step) + 0.3

    x = jnp.asarray(wave(9), jnp.float32).reshape(1, *shape)
    state = optimizer.init({"x": x})
    for step, after in enumerate(want):
        grad = {"x": jnp.asarray(wave(step).reshape(x.shape), jnp.float32)}
        updates: Any
        updates, state = optimizer.update(grad, state)
        x = x - 0.01 * (updates["x"] + 0.1 * x)
        np.testing.assert_allclose(x.ravel(), after, rtol=0, atol=16 * EPS)


@pytest.mark.parametrize("kind, warmup, options, want", RECORDED["schedules"])
def test_learning_rates_are_those_of_transformers(kind, warmup, options, want):
    config = DPOConfig(
        learning_rate=RECORDED["peak"],
        lr_scheduler_type=kind,
        warmup_steps=warmup,
        lr_scheduler_kwargs=options or None,
    )
    schedule = learning_rate_schedule(config, RECORDED["steps"])
    got = [np.asarray(schedule(jnp.int32(step))) for step in range(RECORDED["steps"])]
    # A cosine of pi * share, each rounded: the error of the angle, and of the factor.
    np.testing.assert_allclose(got, want, rtol=0, atol=16 * EPS * RECORDED["peak"])


def test_a_ratio_of_warmup_is_rounded_up():
    """As transformers does."""
    config = DPOConfig(warmup_ratio=0.1)
    assert [config.warmup(steps) for steps in (10, 11, 3)] == [1, 2, 1]
    assert DPOConfig().warmup(10) == 0
    assert DPOConfig(warmup_steps=4).warmup(10) == 4


def test_first_moments_may_be_bfloat16_and_second_ones_not():
    for name in ("adamw", "lion", "sgd", "muon"):
        config = settings(name, mu_dtype="bfloat16")
        mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        params = split_model(tiny_model(CONFIG, mesh))[1]
        optimizer = make_optimizer(config, CONFIG, mesh, STEPS)
        state = jax.eval_shape(optimizer.init, params)
        dtypes = {}
        for path, x in jax.tree.leaves_with_path(state):
            fields = [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]
            dtypes.setdefault(fields[0] if name != "muon" else fields[-2], x.dtype)
        moments = {k: v.name for k, v in dtypes.items() if k in ("mu", "trace", "nu")}
        first = {"trace" if name == "sgd" else "mu": "bfloat16"}
        second = {"nu": "float32"} if name in ("adamw", "muon") else {}
        assert moments == first | second, name


@pytest.mark.parametrize(
    "options, message",
    [
        ({"optimizer": "adam"}, "must be one of adamw, lion, adafactor, sgd, muon"),
        (
            {"optimizer": "sgd", "adam_beta1": 0.8},
            "adam_beta1=0.8 has no effect with optimizer 'sgd'; remove it",
        ),
        ({"sgd_momentum": 0.9}, "sgd_momentum=0.9 has no effect with optimizer 'adamw"),
        ({"optimizer": "sgd", "sgd_nesterov": True}, "without sgd_momentum"),
        ({"optimizer": "sgd", "mu_dtype": "bfloat16"}, "without sgd_momentum"),
        ({"optimizer": "adafactor", "mu_dtype": "8bit"}, "keeps no first moment"),
        (
            {"mu_dtype": "bfloat16", "adam_beta1": 0.999},
            "adam_beta1=0.999 cannot be with mu_dtype='bfloat16'",
        ),
        ({"mu_dtype": "float16"}, "must be one of float32, bfloat16, 8bit"),
        (
            {"optimizer": "lion", "nu_dtype": "8bit"},
            "nu_dtype='8bit' has no effect with optimizer 'lion'; remove it",
        ),
        (
            {"optim": "adamw_8bit"},
            "here it is 'optimizer' (adamw, lion, adafactor, sgd or muon; adamw_8bit "
            "is adamw with mu_dtype and nu_dtype 8bit)",
        ),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "has no effect with warmup_steps=3"),
        ({"warmup_ratio": 1.0}, "warmup_ratio=1.0 must be at least 0 and below 1"),
        (
            {"lr_scheduler_kwargs": {"min_lr": 0.1}},
            "lr_scheduler_kwargs.min_lr=0.1 has no effect with lr_scheduler_type "
            "'linear' (it takes: none)",
        ),
        ({"lr_scheduler_kwargs": {"min": 0.1}}, "lr_scheduler_kwargs.min: no such"),
        ({"lr_scheduler_kwargs": {"min_lr": -1}}, "lr_scheduler_kwargs.min_lr=-1.0"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs one of"),
        ({"lr_scheduler_type": "wsd"}, "needs lr_scheduler_kwargs.num_decay_steps"),
        (
            {
                "lr_scheduler_type": "cosine_with_restarts",
                "lr_scheduler_kwargs": {"num_cycles": 1.5},
            },
            "must be a whole number",
        ),
        (
            {"lr_scheduler_type": "polynomial", "learning_rate": 1e-8},
            "lr_end=1e-07 must be below learning_rate=1e-08",
        ),
    ],
)
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(InputError) as caught:
        DPOConfig(**options)
    assert message in str(caught.value)


def test_phases_longer_than_the_run_are_refused():
    with pytest.raises(InputError, match=r"warmup_ratio=0.9 \(3 steps\) must be less"):
        check_schedule(DPOConfig(warmup_ratio=0.9), 3)
    decay: Any = {"num_decay_steps": 9}
    config = DPOConfig(
        warmup_steps=2, lr_scheduler_type="wsd", lr_scheduler_kwargs=decay
    )
    check_schedule(config, 11)
    with pytest.raises(InputError, match="num_decay_steps=9 and 2 steps of warm-up"):
        check_schedule(config, 10)
