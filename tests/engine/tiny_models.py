"""Small seeded decoders, the same on every mesh; and how tests compare arrays."""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from engine.models import Decoder, abstract_model, parse_hf_config
from engine.parallel.sharding import (
    BATCH,
    TOKENS,
    make_mesh,
    param_specs,
    parameter_spec,
    place,
    stored_shape,
)

TINY = {
    "vocab_size": 101,  # no mesh divides it
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# Between them: every optional parameter, soft-caps, windows, tied and untied heads.
CONFIGS = {
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 12}
    | {"tie_word_embeddings": False},
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "qwen3": {"attention_bias": True, "tie_word_embeddings": False},
}


def one_device():
    return make_mesh(1, 1, 1, jax.devices()[:1])


def mesh_of(sizes):
    """A mesh of (data, fsdp, tensor), or (data, fsdp, tensor, sequence)."""
    data, fsdp, tensor, *sequence = sizes
    devices = jax.devices()[: math.prod(sizes)]
    return make_mesh(data, fsdp, tensor, devices, sequence=math.prod(sequence))


def tiny_config(model_type, **changes):
    values = TINY | {"model_type": model_type} | CONFIGS[model_type] | changes
    return parse_hf_config(values)


def tiny_model(config, mesh, **options):
    """The same seeded numbers on every mesh; biases and norms are random too."""
    arrays = {}
    for path, one in config.parameters().items():
        shape = stored_shape(one, config, mesh)
        true = shape[: len(shape) - len(one.shape)] + one.shape
        rng = np.random.default_rng(zlib.crc32(".".join(path).encode()))
        drawn = 0.2 * rng.standard_normal(true, np.float32)
        whole = np.pad(drawn, [(0, n - m) for n, m in zip(shape, true, strict=True)])
        sharding = place(parameter_spec(one, config, mesh), mesh)
        arrays[path] = jax.device_put(whole, sharding)
    given: dict[str, Any] = {"dtype": "float32"} | options
    return Decoder(config, arrays, mesh=mesh, **given)


def gradient_equations(**options):
    """The equations, at any depth, of the gradient of a model on eight devices."""
    mesh = make_mesh(1, 8, 1)
    model = abstract_model(tiny_config("qwen3"), mesh=mesh, **options)
    graphdef, state = nnx.split(model, nnx.Param)
    specs = param_specs(model.config, mesh)

    def shard(state, tokens):
        def loss(state):
            hidden = nnx.merge(graphdef, state)(tokens)
            return lax.psum(hidden.astype(jnp.float32).sum(), TOKENS)

        return jax.grad(loss)(state)

    run = jax.shard_map(shard, mesh=mesh, in_specs=(specs, P(BATCH)), out_specs=specs)
    jaxpr = jax.make_jaxpr(run)(state, jnp.asarray(random_tokens(8, 16)))
    yield from equations(jaxpr.jaxpr)


def equations(jaxpr):
    """A jaxpr's, at any depth."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def relative(got, want):
    return np.abs(np.asarray(got) - np.asarray(want)).max() / np.abs(want).max()


def random_tokens(rows, length, vocab=101, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, (rows, length), np.int32)


def vocab_rows(tree, vocab):
    """Vocabulary padding depends on the mesh: gradients are compared without it."""
    for name in ("embed", "head"):
        if name in tree:
            assert not tree[name][vocab:].any()
            tree[name] = tree[name][:vocab]
    return tree
