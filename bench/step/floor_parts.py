"""The parts of a step, each by itself, for `bench.step.floor`: how long they take."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from dpo_kernels import token_logprobs
from engine.config.dpo import DPOConfig
from engine.models import Decoder
from engine.models.attention import tiles
from engine.parallel.sharding import BATCH, SEQUENCE, TOKENS
from engine.planning.steps import Step
from engine.planning.work import (
    ATTENTION,
    BACKWARD,
    FORWARD,
    HEAD,
    PROJECTIONS,
    work_of,
)
from engine.training.optimizer import make_optimizer
from engine.training.prepare import step_options
from engine.training.step import init_state, split_model, split_specs, update

ROUNDS = 2


def seconds_of(function: Callable[..., Any], *args: Any) -> float:
    """The mean of a compiled function's times."""
    jax.block_until_ready(function(*args))
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        found.append(time.perf_counter() - began)
    return statistics.mean(found)


def seconds_in_place(function: Callable[..., Any], state: Any, *args: Any) -> float:
    """The mean of the times of what takes its first argument over and returns it."""
    found = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        state = jax.block_until_ready(function(state, *args))
        found.append(time.perf_counter() - began)
    return statistics.mean(found[1:])


def array(*shape: int) -> jax.Array:
    """Normal numbers; the compiler knows nothing of them."""
    return 0.02 * jax.random.normal(jax.random.key(len(shape)), shape)


def product_seconds(terms: str, x: jax.Array, y: jax.Array) -> float:
    """Of XLA's bare product."""
    return seconds_of(jax.jit(functools.partial(jnp.einsum, terms)), x, y)


def matmul_seconds(count: int, outputs: int, inputs: int) -> tuple[float, float]:
    """Of `x W^T`, and of both products of its gradient, for W [outputs, inputs]."""
    x, w, dy = array(count, inputs), array(outputs, inputs), array(count, outputs)
    forward = product_seconds("ti,oi->to", x, w)
    backward = product_seconds("to,oi->ti", dy, w) + product_seconds("to,ti->oi", dy, x)
    return forward, backward


def tile_seconds(config: Any, sequences: int, flops: int) -> float:
    """So many of attention's FLOPs at the rate of a bare product of two tiles."""
    K, G, H = (
        config.num_kv_heads,
        config.num_heads // config.num_kv_heads,
        config.head_dim,
    )
    query = array(sequences, K, G, tiles.TILE, H)
    key = array(sequences, K, tiles.TILE, H)
    scores = array(sequences, K, G, tiles.TILE, tiles.TILE)
    # Of a forward's two products, each half of the FLOPs.
    seconds = product_seconds("RKGsH,RKtH->RKGst", query, key)
    seconds += product_seconds("RKGst,RKtH->RKGsH", scores, key)
    return flops * seconds / (4 * scores.size * H)


def floors(step: Step, sequences: int, length: int) -> dict[tuple[str, str], Any]:
    """FLOPs and the least seconds of each part in each phase."""
    config, count = step.model, sequences * length
    work = work_of(step).flops
    forward = backward = 0.0
    for parameter in config.parameters().values():
        if parameter.stacked and len(parameter.shape) == 2:
            first, second = matmul_seconds(count, *parameter.shape)
            forward += config.num_layers * first
            backward += config.num_layers * second
    head, dhead = matmul_seconds(step.shape[1], config.vocab_size, config.hidden_size)
    found = {}
    for (part, phase), flops in work.items():
        if part == PROJECTIONS:
            # What is computed again is not all: nobody needs a layer's last product.
            again = flops / work[part, FORWARD]
            seconds = backward if phase == BACKWARD else forward * again
        elif part == HEAD:
            seconds = dhead if phase == BACKWARD else head
        elif part == ATTENTION:
            seconds = tile_seconds(config, sequences, flops)
        else:
            continue
        found[part, phase] = (flops, seconds)
    return found


def layers_seconds(model: Decoder, tokens: jax.Array) -> tuple[float, float]:
    """Of the layers alone: forward, and with the gradient of the parameters."""
    graphdef, params, frozen = split_model(model)
    specs, frozen_specs = split_specs(model)

    def forward(params: Any, frozen: Any, tokens: Any) -> Any:
        return nnx.merge(graphdef, params, frozen)(tokens)

    def gradient(params: Any, frozen: Any, tokens: Any) -> Any:
        def total(params: Any) -> Any:
            hidden = forward(params, frozen, tokens)
            return jax.lax.psum(jnp.square(hidden).sum(), TOKENS)

        return jax.grad(total)(params)

    def seconds(function: Any, out: Any) -> float:
        sharded = jax.shard_map(
            function,
            mesh=model.mesh,
            in_specs=(specs, frozen_specs, P(BATCH, None)),
            out_specs=out,
        )
        return seconds_of(jax.jit(sharded), params, frozen, tokens)

    return seconds(forward, P(BATCH, SEQUENCE, None)), seconds(gradient, specs)


def attention_seconds(config: Any, sequences: int, length: int) -> tuple[float, float]:
    """Of all layers' attention: forward, and with its gradient."""
    q = array(sequences, length, config.num_heads, config.head_dim)
    k = array(sequences, length, config.num_kv_heads, config.head_dim)
    attend = functools.partial(tiles.attend, scale=config.query_scale)

    def total(q: Any, k: Any, v: Any) -> Any:
        return jnp.square(attend(q, k, v)).sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    forward = seconds_of(jax.jit(attend), q, k, k + 1)
    both = seconds_of(gradient, q, k, k + 1)
    return config.num_layers * forward, config.num_layers * both


def head_seconds(config: Any, count: int) -> tuple[float, float]:
    """Of the op: forward, and with both gradients."""
    hidden, head = (
        array(count, config.hidden_size),
        array(config.vocab_size, config.hidden_size),
    )
    targets = jnp.arange(count, dtype=jnp.int32)

    def logprobs(hidden: Any, head: Any) -> Any:
        return token_logprobs(hidden, head, targets).logprob

    gradient = jax.grad(lambda *args: logprobs(*args).sum(), argnums=(0, 1))
    return (
        seconds_of(jax.jit(logprobs), hidden, head),
        seconds_of(jax.jit(gradient), hidden, head),
    )


def optimizer_seconds(model: Decoder, arguments: DPOConfig) -> tuple[float, float]:
    """Of an update, and its floor."""
    optimizer = make_optimizer(arguments, model.config, model.mesh, total_steps=10)
    # A state of copies: the step donates what it is given.
    state = jax.tree.map(jnp.copy, init_state(model, optimizer))
    grads = jax.tree.map(jnp.ones_like, state.params)
    options = step_options(arguments)
    norm = jnp.float32(1.0)

    @functools.partial(jax.jit, donate_argnums=0)
    def move(state: Any, grads: Any) -> Any:
        return update(state, grads, norm, optimizer, options)

    size = sum(x.size for x in jax.tree.leaves(state.params))
    seconds = seconds_in_place(move, state, grads)
    # Reads 4 bytes and writes 4, in place, as the update does.
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    return seconds, seconds_in_place(copy, jnp.zeros(size)) * 7 / 2
