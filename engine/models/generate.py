"""Full logits and greedy decoding: for tests and the demo, not for training."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from engine.errors import InputError
from engine.models.decoder import Decoder
from engine.parallel.sharding import BATCH, DATA, FSDP, VOCAB, param_specs

_LENGTH_STEP = 64  # buffers are a multiple of this long, so that few are compiled


def _logits(model: Decoder, hidden: Array, head: Array) -> Array:
    """float32 logits of the true vocabulary, soft-capped as the model says."""
    logits = jnp.einsum(
        "...D,VD->...V", hidden, head, preferred_element_type=jnp.float32
    )
    logits = logits[..., : model.config.vocab_size]
    cap = model.config.final_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _forward(graphdef: Any, state: Any, tokens: Array, last: Array | None) -> Array:
    """Logits of every position, or of position `last` of each row only."""
    model = nnx.merge(graphdef, state)
    mesh = model.mesh

    def shard(state, tokens):
        local = nnx.merge(graphdef, state)
        return local(tokens), local.head_weight()

    hidden, head = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(param_specs(model.config, mesh), P(BATCH)),
        out_specs=(P(BATCH), P(VOCAB)),
    )(state, tokens)
    if last is not None:
        hidden = hidden[jnp.arange(hidden.shape[0]), last]
    return _logits(model, hidden, head)


@functools.partial(jax.jit, static_argnums=0)
def _full_logits(graphdef, state, tokens):
    return _forward(graphdef, state, tokens, None)


@functools.partial(jax.jit, static_argnums=0)
def _greedy(graphdef, state, tokens, lengths, limits, eos_id):
    """Appends the likeliest token to each row until `eos_id` or its limit."""

    def going(carry):
        _, lengths, done = carry
        return jnp.any(~done & (lengths < limits))

    def step(carry):
        tokens, lengths, done = carry
        rows = jnp.arange(tokens.shape[0])
        logits = _forward(graphdef, state, tokens, lengths - 1)
        chosen = jnp.argmax(logits, axis=-1).astype(tokens.dtype)
        active = ~done & (lengths < limits)
        at = jnp.minimum(lengths, tokens.shape[1] - 1)
        chosen = jnp.where(active, chosen, tokens[rows, at])
        tokens = tokens.at[rows, at].set(chosen)
        done = done | (active & (chosen == eos_id))
        return tokens, lengths + active.astype(lengths.dtype), done

    done = jnp.zeros(lengths.shape, bool)
    tokens, lengths, _ = lax.while_loop(going, step, (tokens, lengths, done))
    return tokens, lengths


def _row_multiple(model: Decoder) -> int:
    return model.mesh.shape[DATA] * model.mesh.shape[FSDP]


def full_logits(model: Decoder, tokens: Int[Array, "R S"]) -> Float[Array, "R S V"]:
    """Logits of every position, float32, final soft-cap included.

    Materialises [R, S, V]: for parity tests and small models only.
    """
    rows = tokens.shape[0]
    padded = jnp.pad(tokens, ((0, -rows % _row_multiple(model)), (0, 0)))
    graphdef, state = nnx.split(model)
    return _full_logits(graphdef, state, padded)[:rows]


def greedy_generate(
    model: Decoder,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_id: int | None,
) -> list[list[int]]:
    """The likeliest continuation of each prompt, without it; an `eos_id` ends it.

    Every step runs the whole buffer (no cache): for small models and short texts.
    """
    if not prompt_ids or min(map(len, prompt_ids)) == 0:
        raise InputError("generation needs at least one prompt, and no empty ones")
    starts = [len(prompt) for prompt in prompt_ids]
    length = max(starts) + max_new_tokens
    length = -(-length // _LENGTH_STEP) * _LENGTH_STEP
    rows = len(starts) + -len(starts) % _row_multiple(model)
    tokens = np.zeros((rows, length), np.int32)
    lengths = np.ones(rows, np.int32)
    limits = np.ones(rows, np.int32)  # rows that only fill the mesh have nothing to add
    for row, prompt in enumerate(prompt_ids):
        tokens[row, : starts[row]] = prompt
        lengths[row] = starts[row]
        limits[row] = starts[row] + max_new_tokens
    graphdef, state = nnx.split(model)
    eos = np.int32(-1 if eos_id is None else eos_id)
    out, ends = map(np.asarray, _greedy(graphdef, state, tokens, lengths, limits, eos))
    return [out[row, start : ends[row]].tolist() for row, start in enumerate(starts)]
