"""Full logits, and texts that a model goes on with: to look at, not for training."""

import functools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt32

from engine.errors import InputError
from engine.models.decoder import Decoder
from engine.parallel.row_parts import RowParts
from engine.parallel.sharding import (
    BATCH,
    DATA,
    FSDP,
    SEQUENCE,
    VOCAB,
    param_specs,
    place,
)

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
        parts = RowParts.of(tokens.shape[1])
        hidden = parts.gather(local(tokens))[:, : parts.length]
        # All devices along `sequence` have the same, which the first one gives.
        return hidden[None], local.head_weight()

    hidden, head = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(param_specs(model.config, mesh), P(BATCH)),
        out_specs=(P(SEQUENCE, BATCH), P(VOCAB)),
    )(state, tokens)
    hidden = hidden[0]
    if last is not None:
        hidden = hidden[jnp.arange(hidden.shape[0]), last]
    return _logits(model, hidden, head)


@functools.partial(jax.jit, static_argnums=0)
def _full_logits(graphdef, state, tokens):
    return _forward(graphdef, state, tokens, None)


class _Buffers(NamedTuple):
    """Rows of tokens that are continued."""

    tokens: Int[Array | np.ndarray, "R S"]
    lengths: Int[Array | np.ndarray, " R"]
    limits: Int[Array | np.ndarray, " R"]  # what a row may grow to
    ends: Int[Array | np.ndarray, " n"]  # a token of these ends a row; -1: none
    temperature: Float[Array | np.ndarray, ""]
    seed: UInt32[Array | np.ndarray, ""]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _continue(
    graphdef: Any, state: Any, buffers: _Buffers, drawn: bool
) -> tuple[Array, Array]:
    """Appends a token at a time to each row, until one that ends it or its limit.

    The likeliest token, or one that is drawn: by the row and by how many came before
    it, so that two models that agree draw the same.
    """
    tokens, lengths, limits, ends, temperature, seed = buffers
    rows = jnp.arange(tokens.shape[0])
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), rows)

    def choose(logits: Array, count: Array) -> Array:
        if drawn:
            keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, count)
            noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
            logits = logits / temperature + noise
        return jnp.argmax(logits, axis=-1).astype(tokens.dtype)

    def going(carry):
        _, lengths, done, _ = carry
        return jnp.any(~done & (lengths < limits))

    def step(carry):
        tokens, lengths, done, count = carry
        chosen = choose(_forward(graphdef, state, tokens, lengths - 1), count)
        active = ~done & (lengths < limits)
        at = jnp.minimum(lengths, tokens.shape[1] - 1)
        chosen = jnp.where(active, chosen, tokens[rows, at])
        tokens = tokens.at[rows, at].set(chosen)
        done = done | (active & jnp.isin(chosen, ends))
        return tokens, lengths + active.astype(lengths.dtype), done, count + 1

    done = jnp.zeros(lengths.shape, bool)
    carry = tokens, lengths, done, jnp.int32(0)
    tokens, lengths, _, _ = lax.while_loop(going, step, carry)
    whole = place(P(), nnx.merge(graphdef, state).mesh)  # for every process to read
    return lax.with_sharding_constraint((tokens, lengths), whole)


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


class Generator:
    """Continues some prompts: every call with the same ones, in programs made ahead.

    Every token runs the whole buffer (there is no cache of keys and values): a call
    costs as many passes forward as it makes tokens, over all prompts at once.

    Args:
        ends: a token of these ends a continuation, and is its last.
        temperature: 0: the likeliest token each time.
        seed: of what is drawn otherwise.
    """

    def __init__(
        self,
        prompt_ids: Sequence[Sequence[int]],
        max_new_tokens: int,
        ends: Collection[int],
        *,
        temperature: float = 0.0,
        seed: int = 0,
    ):
        if not prompt_ids or min(map(len, prompt_ids)) == 0:
            raise InputError("generation needs at least one prompt, and no empty ones")
        self._prompts = [list(map(int, prompt)) for prompt in prompt_ids]
        self._max_new_tokens = max_new_tokens
        self._ends = sorted(ends) or [-1]
        self._temperature, self._seed = temperature, seed
        self._programs: dict[Any, jax.stages.Compiled] = {}

    def __call__(self, model: Decoder) -> list[list[int]]:
        """The continuation of each prompt, without it."""
        found = self.compile(model)(nnx.split(model)[1], self._buffers(model))
        out, ends = map(np.asarray, found)
        return [
            out[row, len(prompt) : ends[row]].tolist()
            for row, prompt in enumerate(self._prompts)
        ]

    def compile(self, model: Decoder) -> jax.stages.Compiled:
        """The program for models like this one."""
        graphdef, state = nnx.split(model)
        kind = graphdef, *((x.shape, x.dtype) for x in jax.tree.leaves(state))
        if kind not in self._programs:
            drawn = self._temperature > 0
            self._programs[kind] = _continue.lower(
                graphdef, _abstract(model, state), self._buffers(model), drawn
            ).compile()
        return self._programs[kind]

    def _buffers(self, model: Decoder) -> _Buffers:
        starts = [len(prompt) for prompt in self._prompts]
        length = max(starts) + self._max_new_tokens
        length = -(-length // _LENGTH_STEP) * _LENGTH_STEP
        rows = len(starts) + -len(starts) % _row_multiple(model)
        tokens = np.zeros((rows, length), np.int32)
        lengths = np.ones(rows, np.int32)
        limits = np.ones(rows, np.int32)  # what only fills the mesh has nothing to add
        for row, prompt in enumerate(self._prompts):
            tokens[row, : starts[row]] = prompt
            lengths[row] = starts[row]
            limits[row] = starts[row] + self._max_new_tokens
        return _Buffers(
            tokens,
            lengths,
            limits,
            ends=np.asarray(self._ends, np.int32),
            temperature=np.asarray(self._temperature, np.float32),
            seed=np.asarray(self._seed, np.uint32),
        )


def _abstract(model: Decoder, state: Any) -> Any:
    """A model's state where training leaves it."""
    specs = param_specs(model.config, model.mesh)
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=place(spec, model.mesh)
        ),
        state,
        specs,
    )


def greedy_generate(
    model: Decoder,
    prompt_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_id: int | None,
) -> list[list[int]]:
    """The likeliest continuation of each prompt, without it; an `eos_id` ends it.

    For small models and short texts: see `Generator`.
    """
    ends = () if eos_id is None else (eos_id,)
    return Generator(prompt_ids, max_new_tokens, ends)(model)
