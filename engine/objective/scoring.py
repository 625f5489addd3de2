"""Log-probabilities of a microbatch's completions under one model, inside shard_map.

The scored hidden states are gathered over `fsdp`; each device scores them against its
own slice of the vocabulary, and all get the results of the whole fsdp group. Letters:
F devices along `fsdp`; P pairs, Q = 2P sequences and T scored tokens at most on each of
them; B = F P.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from dpo_kernels import TokenLogprobs, sequence_sums, token_logprobs
from engine.models import Decoder
from engine.objective.gather import compact_index, take_distinct_rows
from engine.parallel.batch import Batch
from engine.parallel.sharding import FSDP, VOCAB


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How the op is called: see `dpo_kernels.token_logprobs`."""

    workspace_bytes: int = 256 * 2**20
    implementation: str = "auto"


class GroupTokens(NamedTuple):
    """The scored tokens of an fsdp group; the same on all of its devices."""

    # Of the F*T gathered hidden states, those that are scored, in order; then others.
    order: Int[Array, " FT"]
    total: Int[Array, ""]  # how many are scored
    targets: Int[Array, " FT"]  # in that order
    offsets: Int[Array, " FQ+1"]  # in that order, where each sequence begins
    pair_weights: Float[Array, " B"]


class SequenceLogps(NamedTuple):
    """Of the pairs of an fsdp group."""

    chosen: Float[Array, " B"]  # summed log-probability, nats, float32
    rejected: Float[Array, " B"]
    chosen_length: Float[Array, " B"]  # scored tokens
    rejected_length: Float[Array, " B"]
    tokens: TokenLogprobs  # in the order of GroupTokens


def _gather(x: np.ndarray | Array) -> Array:
    return lax.all_gather(x, FSDP, axis=0, tiled=True, to="invarying")


def group_tokens(microbatch: Batch) -> GroupTokens:
    """Gather which tokens are scored over `fsdp`, and close the gaps between them."""
    scored = microbatch.scored
    counts_FQ = _gather(scored.counts)
    order, total = compact_index(counts_FQ.sum(axis=1), scored.positions.shape[-1])
    # In the order of the devices, and on each of its sequences: ascending.
    ends = jnp.cumsum(counts_FQ.reshape(-1))
    return GroupTokens(
        order=order,
        total=total,
        targets=_gather(scored.targets[0])[order],
        offsets=jnp.concatenate([jnp.zeros_like(ends[:1]), ends]),
        pair_weights=_gather(microbatch.pairs.weights[0]),
    )


def by_pair(values_FQ: Float[Array, " FQ"]) -> tuple[Array, Array]:
    """Values of an fsdp group's sequences, as the chosen's and the rejected's."""
    values_F2P = values_FQ.reshape(lax.axis_size(FSDP), 2, -1)
    return values_F2P[:, 0].reshape(-1), values_F2P[:, 1].reshape(-1)


def score_completions(
    model: Decoder,
    microbatch: Batch,
    group: GroupTokens,
    options: ScoringOptions,
    stats: tuple[str, ...] = (),
) -> SequenceLogps:
    """Run the model on this device's rows; score the tokens of the fsdp group."""
    hidden_WSD = model(jnp.asarray(microbatch.rows.tokens))
    positions = microbatch.scored.positions[0]
    count = microbatch.scored.counts[0].sum()
    used = jnp.arange(positions.shape[0], dtype=jnp.int32) < count
    hidden_TD = take_distinct_rows(
        hidden_WSD.reshape(-1, hidden_WSD.shape[-1]), positions, used
    )
    # Typed as varying over fsdp: its gradient is then reduce-scattered, not summed.
    hidden = lax.all_gather(hidden_TD, FSDP, axis=0, tiled=True)
    if lax.axis_size(FSDP) > 1:
        valid = jnp.arange(hidden.shape[0], dtype=jnp.int32) < group.total
        hidden = take_distinct_rows(hidden, group.order, valid)
    head = model.head_weight()
    tokens = token_logprobs(
        hidden,
        head,
        group.targets,
        num_valid=group.total,
        bias=_padding_bias(model.config.vocab_size, head.shape[0]),
        softcap=model.config.final_softcap,
        axis_name=VOCAB,
        stats=stats,
        workspace_bytes=options.workspace_bytes,
        implementation=options.implementation,
    )
    sums, counts = sequence_sums(
        tokens.logprob,
        offsets=group.offsets,
        # xla means no kernels at all; the others need not be the sums' choice.
        implementation="xla" if options.implementation == "xla" else "auto",
    )
    return SequenceLogps(*by_pair(sums), *by_pair(counts), tokens=tokens)


def _padding_bias(vocab_size: int, local_vocab: int) -> Float[Array, " V"] | None:
    """-inf for the rows that pad the head to a multiple of the devices, if any."""
    if local_vocab * lax.axis_size(VOCAB) == vocab_size:
        return None
    ids = lax.axis_index(VOCAB) * local_vocab + jnp.arange(local_vocab, dtype=jnp.int32)
    return jnp.where(ids < vocab_size, 0.0, -jnp.inf).astype(jnp.float32)


def token_weights(
    group: GroupTokens,
) -> tuple[Float[Array, " FT"], Float[Array, " FT"]]:
    """The weight of each token's pair, as a chosen and as a rejected token's."""
    F = lax.axis_size(FSDP)
    weights_F1P = group.pair_weights.reshape(F, 1, -1)
    sides = jnp.array([1.0, 0.0])[None, :, None]
    chosen_FQ = (weights_F1P * sides).reshape(-1)
    rejected_FQ = (weights_F1P * (1 - sides)).reshape(-1)
    # Padding belongs to a sequence past the end, which weighs nothing.
    index_T = jnp.arange(group.order.shape[0], dtype=jnp.int32)
    sequence_T = jnp.searchsorted(
        group.offsets[1:], index_T, side="right", method="scan_unrolled"
    )
    return (
        jnp.append(chosen_FQ, 0.0)[sequence_T],
        jnp.append(rejected_FQ, 0.0)[sequence_T],
    )
