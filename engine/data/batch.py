"""What one optimizer step is given."""

from typing import Any, NamedTuple

import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float32, Int32

from engine.parallel.sharding import BATCH


class Batch(NamedTuple):
    """One optimizer step's pairs: A microbatches of B pairs, for N shards.

    Shard n owns the pairs [n*Bl, (n+1)*Bl) of each microbatch, Bl = B/N. Its sequences
    are numbered 0 .. 2*Bl-1, the chosen ones first. The host's arrays are numpy's.
    """

    # Axis 1: chosen, rejected. Padded on the right with 0.
    tokens: Int32[np.ndarray | Array, "A 2 B S"]
    # Rows of the shard's [2*Bl*S] hidden states whose next token is scored; then 0.
    positions: Int32[np.ndarray | Array, "A N T"]
    # The tokens to score; then 0.
    targets: Int32[np.ndarray | Array, "A N T"]
    # How many of T each of the shard's 2*Bl sequences scores; they lie in that order.
    num_scored: Int32[np.ndarray | Array, "A N R"]
    # 1 for each real pair, 0 for a filler, which has no tokens.
    weights: Float32[np.ndarray | Array, "A B"]


def batch_specs() -> Batch:
    """A PartitionSpec in the place of each array; axis 0 counts microbatches."""
    tokens: Any = P(None, None, BATCH, None)
    by_shard: Any = P(None, BATCH, None)
    by_pair: Any = P(None, BATCH)
    return Batch(
        tokens=tokens,
        positions=by_shard,
        targets=by_shard,
        num_scored=by_shard,
        weights=by_pair,
    )
