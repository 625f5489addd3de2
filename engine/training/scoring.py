"""Log-probabilities of a batch's completions under one model, inside shard_map.

The scored rows of the hidden states are gathered over `fsdp`; each device scores them
against its own slice of the vocabulary. Letters: F devices along `fsdp`, Bl pairs on
one device, R = 2 Bl sequences on it, T its row capacity, S sequence length.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from dpo_kernels import TokenLogprobs, sequence_sums, token_logprobs
from engine.data.batch import Batch
from engine.models import Decoder
from engine.parallel.sharding import FSDP, VOCAB
from engine.training.gather import compact_index, take_distinct_rows

STATS = ("entropy", "mean_logit", "top1")
TOKEN_SUMS = (
    *("scored", "scored_chosen", "scored_rejected"),
    *("entropy", "logits_chosen", "logits_rejected", "top1_chosen"),
)


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How the op is called: see `dpo_kernels.token_logprobs`."""

    workspace_bytes: int = 256 * 2**20
    implementation: str = "auto"


class ScoredRows(NamedTuple):
    """Which rows of a microbatch are scored; the same on all devices of `fsdp`."""

    order: Int[Array, " FT"]  # of the gathered rows: the valid ones first
    total: Int[Array, ""]  # how many are valid
    targets: Int[Array, " FT"]
    offsets: Int[Array, " FR+1"]  # where the rows of each sequence of the group begin


class Completions(NamedTuple):
    """Per-pair results, over the pairs of the whole fsdp group."""

    chosen: Float[Array, " B"]  # summed log-probability, nats, float32
    rejected: Float[Array, " B"]
    chosen_length: Float[Array, " B"]  # scored tokens
    rejected_length: Float[Array, " B"]
    tokens: TokenLogprobs  # per row of ScoredRows, valid rows first


def _gather(x: np.ndarray | Array) -> Array:
    return lax.all_gather(x, FSDP, axis=0, tiled=True, to="invarying")


def scored_rows(microbatch: Batch) -> ScoredRows:
    """Gather the ids of the scored rows over `fsdp` and close the gaps between them."""
    counts_FR = _gather(microbatch.num_scored)
    capacity = microbatch.positions.shape[-1]
    order, total = compact_index(counts_FR.sum(axis=1), capacity)
    # In the order of the devices, and on each of its sequences: ascending.
    ends = jnp.cumsum(counts_FR.reshape(-1))
    return ScoredRows(
        order=order,
        total=total,
        targets=_gather(microbatch.targets[0])[order],
        offsets=jnp.concatenate([jnp.zeros_like(ends[:1]), ends]),
    )


def by_pair(values_R: Float[Array, " R"]) -> tuple[Array, Array]:
    """Per-sequence values of an fsdp group, as the chosen's and the rejected's."""
    F = lax.axis_size(FSDP)
    values_F2B = values_R.reshape(F, 2, -1)
    return values_F2B[:, 0].reshape(-1), values_F2B[:, 1].reshape(-1)


def score_completions(
    model: Decoder,
    microbatch: Batch,
    rows: ScoredRows,
    options: ScoringOptions,
    stats: tuple[str, ...] = (),
) -> Completions:
    """Run the model on this device's pairs; score those of the fsdp group."""
    _, Bl, S = microbatch.tokens.shape
    hidden = model(jnp.asarray(microbatch.tokens).reshape(2 * Bl, S))
    positions = microbatch.positions[0]
    num_scored = microbatch.num_scored[0].sum()
    used = jnp.arange(positions.shape[0], dtype=jnp.int32) < num_scored
    hidden = take_distinct_rows(hidden.reshape(2 * Bl * S, -1), positions, used)
    # Typed as varying over fsdp: its gradient is then reduce-scattered, not summed.
    hidden = lax.all_gather(hidden, FSDP, axis=0, tiled=True)
    if lax.axis_size(FSDP) > 1:
        valid = jnp.arange(hidden.shape[0], dtype=jnp.int32) < rows.total
        hidden = take_distinct_rows(hidden, rows.order, valid)
    head = model.head_weight()
    tokens = token_logprobs(
        hidden,
        head,
        rows.targets,
        num_valid=rows.total,
        bias=_padding_bias(model.config.vocab_size, head.shape[0]),
        softcap=model.config.final_softcap,
        axis_name=VOCAB,
        stats=stats,
        workspace_bytes=options.workspace_bytes,
        implementation=options.implementation,
    )
    sums, counts = sequence_sums(
        tokens.logprob,
        offsets=rows.offsets,
        # xla means no kernels at all; the others need not be the sums' choice.
        implementation="xla" if options.implementation == "xla" else "auto",
    )
    return Completions(*by_pair(sums), *by_pair(counts), tokens=tokens)


def _padding_bias(vocab_size: int, local_vocab: int) -> Float[Array, " V"] | None:
    """-inf for the rows that pad the head to a multiple of the devices, if any."""
    if local_vocab * lax.axis_size(VOCAB) == vocab_size:
        return None
    ids = lax.axis_index(VOCAB) * local_vocab + jnp.arange(local_vocab, dtype=jnp.int32)
    return jnp.where(ids < vocab_size, 0.0, -jnp.inf).astype(jnp.float32)


def token_sums(
    completions: Completions, rows: ScoredRows, weights_B: Float[Array, " B"]
) -> dict[str, Float[Array, ""]]:
    """Sums over the scored tokens of real pairs, for the token metrics."""
    F = lax.axis_size(FSDP)
    weights_R = jnp.tile(weights_B.reshape(F, 1, -1), (1, 2, 1)).reshape(-1)
    rejected_R = jnp.zeros((F, 2, weights_B.shape[0] // F)).at[:, 1].set(1).reshape(-1)
    # Padding rows belong to a sequence past the end, which weighs nothing.
    row_T = jnp.arange(rows.order.shape[0], dtype=jnp.int32)
    sequence_T = jnp.searchsorted(
        rows.offsets[1:], row_T, side="right", method="scan_unrolled"
    )
    weight_T = jnp.append(weights_R, 0.0)[sequence_T]
    rejected_T = weight_T * jnp.append(rejected_R, 0.0)[sequence_T]
    chosen_T = weight_T - rejected_T
    tokens = jax.tree.map(lax.stop_gradient, completions.tokens)
    assert tokens.entropy is not None, "token sums need the stats of STATS"
    assert tokens.mean_logit is not None and tokens.top1 is not None
    per_token = (
        *(weight_T, chosen_T, rejected_T),
        weight_T * tokens.entropy,
        chosen_T * tokens.mean_logit,
        rejected_T * tokens.mean_logit,
        chosen_T * tokens.top1.astype(jnp.float32),
    )
    return dict(zip(TOKEN_SUMS, (x.sum() for x in per_token), strict=True))
