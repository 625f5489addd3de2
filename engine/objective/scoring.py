"""Log-probabilities of a microbatch's completions under one model, inside shard_map.

The scored hidden states are gathered over `fsdp`; each device scores them against its
own slice of the vocabulary, and all get the results of the whole fsdp group. Where rows
are spread over `sequence`, each of its devices has those of its part first, and then as
many as any other, in the order of the sequences. Letters: F devices along `fsdp`; P
pairs, Q = 2P sequences and T scored tokens at most on each of them; B = F P.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from dpo_kernels import TokenLogprobs, sequence_sums, spread_token_logprobs
from dpo_kernels.op.blocks import compact_index
from engine.models import Decoder
from engine.objective.gather import take_distinct_rows
from engine.parallel.batch import PADDED, Arrangement, Batch
from engine.parallel.collectives import after
from engine.parallel.row_parts import RowParts, even_size, spread_rows
from engine.parallel.sharding import FSDP, SEQUENCE, SPLIT, VOCAB


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How the models and the op are called, and what is summed.

    See `dpo_kernels.token_logprobs`.
    """

    workspace_bytes: int = 256 * 2**20
    implementation: str = "auto"
    # The weight of tokens past the length of the pair's shorter completion; None: 1.
    ld_alpha: float | None = None
    arrangement: Arrangement = PADDED  # of the batches that are scored
    attention: str = "auto"  # of the models: see `engine.models.attention`


class GroupTokens(NamedTuple):
    """The scored tokens of an fsdp group; the same on all of its devices."""

    # Of the F*T gathered hidden states, those that are scored, in order; then others.
    order: Int[Array, " FT"]
    total: Int[Array, ""]  # how many are scored
    offsets: Int[Array, " FQ+1"]  # in that order, where each sequence begins
    pair_weights: Float[Array, " B"]


class SequenceLogps(NamedTuple):
    """Of the pairs of an fsdp group; sums of log-probabilities in nats, float32."""

    chosen: Float[Array, " B"]  # by the weights that ld_alpha gives tokens
    rejected: Float[Array, " B"]
    whole_chosen: Float[Array, " B"]  # every scored token weighing 1
    chosen_length: Float[Array, " B"]  # scored tokens
    rejected_length: Float[Array, " B"]
    tokens: TokenLogprobs  # in the order of GroupTokens


def _gather(x: np.ndarray | Array) -> Array:
    return lax.all_gather(x, FSDP, axis=0, tiled=True, to="invarying")


def group_tokens(microbatch: Batch) -> GroupTokens:
    """Gather which tokens are scored over `fsdp`, and close the gaps between them."""
    scored = microbatch.scored
    counts_FQ, capacity = _gather(scored.counts), scored.targets.shape[-1]
    order, total = compact_index(counts_FQ.sum(axis=1), even_size(capacity))
    # In the order of the devices, and on each of its sequences: ascending.
    ends = jnp.cumsum(counts_FQ.reshape(-1))
    return GroupTokens(
        order=order,
        total=total,
        offsets=jnp.concatenate([jnp.zeros_like(ends[:1]), ends]),
        pair_weights=_gather(microbatch.pairs.weights[0]),
    )


def _own_share(microbatch: Batch) -> tuple[Int[Array, " t"], Int[Array, ""]]:
    """Targets of the rows that `spread_rows` gives this device; how many are scored."""
    scored = microbatch.scored
    capacity, devices = scored.targets.shape[-1], lax.axis_size(SEQUENCE)
    size = even_size(capacity) // devices
    first = lax.axis_index(SEQUENCE) * size
    targets = jnp.pad(scored.targets[0], (0, size * devices - capacity))
    targets = lax.dynamic_slice_in_dim(targets, first, size)
    return targets, jnp.clip(scored.counts[0].sum() - first, 0, size)


def _in_order(own: Array, group: GroupTokens) -> Array:
    """Of each device's rows what the whole group has, in its order; others are 0."""
    every = lax.all_gather(own, SPLIT, axis=0, tiled=True, to="invarying")
    scored = jnp.arange(every.shape[0], dtype=jnp.int32) < group.total
    ordered = take_distinct_rows(every[:, None], group.order, scored)[:, 0]
    return jnp.where(scored, ordered, jnp.zeros((), ordered.dtype))


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
    dropout_key: Key[Array, ""] | None = None,
) -> SequenceLogps:
    """Run the model on this device's rows; score the tokens of the fsdp group."""
    rows = microbatch.rows
    hidden_WSD = model(
        jnp.asarray(rows.tokens),
        dropout_key,
        rows.spans,
        arrangement=options.arrangement,
        attention=options.attention,
    )
    positions = microbatch.scored.positions[0]
    count = microbatch.scored.counts[0].sum()
    used = jnp.arange(positions.shape[0], dtype=jnp.int32) < count
    parts = RowParts.of(rows.tokens.shape[1])
    if parts.devices > 1:
        positions, own = parts.find(positions)
        used = used & own
    hidden_TD = take_distinct_rows(
        hidden_WSD.reshape(-1, hidden_WSD.shape[-1]), positions, used
    )
    hidden_TD = spread_rows(hidden_TD, used)
    targets, num_valid = _own_share(microbatch)
    targets, num_valid = after((targets, num_valid), hidden_TD, model.mesh)
    head = model.head_weight()
    tokens = spread_token_logprobs(
        hidden_TD,
        head,
        targets,
        num_valid=num_valid,
        bias=_padding_bias(model.config.vocab_size, head.shape[0]),
        softcap=model.config.final_softcap,
        axis_name=VOCAB,
        rows_axis=SPLIT,
        stats=stats,
        workspace_bytes=options.workspace_bytes,
        implementation=options.implementation,
    )
    tokens = jax.tree.map(lambda x: _in_order(x, group), tokens)
    return _sequence_logps(tokens, group, options)


def _sums(
    values: Float[Array, " FT"], offsets: Int[Array, " bounds"], options: ScoringOptions
) -> tuple[Array, Array]:
    """Sums of values between offsets, and how many there are."""
    return sequence_sums(
        values,
        offsets=offsets,
        # xla means no kernels at all; the others need not be the sums' choice.
        implementation="xla" if options.implementation == "xla" else "auto",
    )


def _sequence_logps(
    tokens: TokenLogprobs, group: GroupTokens, options: ScoringOptions
) -> SequenceLogps:
    if options.ld_alpha is None:
        sums, counts = _sums(tokens.logprob, group.offsets, options)
        (chosen, rejected), lengths = by_pair(sums), by_pair(counts)
        return SequenceLogps(chosen, rejected, chosen, *lengths, tokens=tokens)
    # Each sequence is summed in two pieces, cut at the length of the shorter one of its
    # pair (Liu et al. 2024, arXiv:2409.06411, eq. 11).
    begins, counts_FQ = group.offsets[:-1], jnp.diff(group.offsets)
    counts_F2P = counts_FQ.reshape(lax.axis_size(FSDP), 2, -1)
    shared = jnp.broadcast_to(counts_F2P.min(axis=1, keepdims=True), counts_F2P.shape)
    cuts = jnp.stack([begins, begins + shared.reshape(-1)], axis=1)
    offsets = jnp.concatenate([cuts.reshape(-1), group.offsets[-1:]])
    sums, counts = _sums(tokens.logprob, offsets, options)
    sums_FQ2, lengths = sums.reshape(-1, 2), by_pair(counts.reshape(-1, 2).sum(axis=1))
    weighted = sums_FQ2[:, 0] + options.ld_alpha * sums_FQ2[:, 1]
    whole_chosen, _ = by_pair(sums_FQ2.sum(axis=1))
    return SequenceLogps(*by_pair(weighted), whole_chosen, *lengths, tokens=tokens)


def pair_sums(
    values: Float[Array, " FT"], group: GroupTokens, options: ScoringOptions
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Sums of values of tokens over the chosen and over the rejected of each pair."""
    return by_pair(_sums(values, group.offsets, options)[0])


def pair_likelihood(
    scored: SequenceLogps, group: GroupTokens, options: ScoringOptions
) -> Float[Array, " B"]:
    """WPO's weight of each pair: how likely the policy itself is to give both answers.

    The product over both of exp(mean over tokens of (log p(target) - log sum_v p_v^2));
    no gradient flows through it.

    Source: Zhou et al. 2024, arXiv:2406.11827, eq. 2.
    """
    collision = scored.tokens.collision
    assert collision is not None
    # What pads the tokens has a collision of 0.
    aligned = scored.tokens.logprob - jnp.log(jnp.where(collision > 0, collision, 1.0))
    chosen, rejected = pair_sums(aligned, group, options)
    mean = chosen / jnp.maximum(scored.chosen_length, 1)
    mean += rejected / jnp.maximum(scored.rejected_length, 1)
    return lax.stop_gradient(jnp.exp(mean))


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
