"""Preference pairs as token ids: what tokenisation makes and batches are made of."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64


class Doubt(NamedTuple):
    """Something surely not meant, in `num_rows` rows, the first of them row `first`."""

    kind: str  # a key of doubts.MEANINGS
    num_rows: int
    first: int


class Limits(NamedTuple):
    """What is cut from a sequence, in this order. None: no limit."""

    max_prompt_length: int | None  # the prompt's end stays, behind its BOS
    max_completion_length: int | None  # the completion's start stays
    max_length: int | None  # of both together
    truncation_mode: str  # which part `max_length` leaves: keep_start or keep_end

    def at_most(self, bound: int) -> "Limits":
        """These, with no number above `bound`."""
        prompt, completion, both = (
            None if limit is None else min(limit, bound)
            for limit in (
                self.max_prompt_length,
                self.max_completion_length,
                self.max_length,
            )
        )
        return Limits(prompt, completion, both, self.truncation_mode)


@dataclass(frozen=True, eq=False, kw_only=True)
class PairTokens:
    """Tokenised pairs: sequence 2p is the chosen one of pair p, 2p + 1 the rejected.

    Sequence i is tokens[offsets[i]:offsets[i + 1]]; its tokens from score_start[i] on
    are scored, at least one, and the first has a token before it (score_start >= 1).
    """

    tokens: Int32[np.ndarray, " tokens"]
    offsets: Int64[np.ndarray, " bounds"]
    score_start: Int32[np.ndarray, " sequences"]
    rows: Int64[np.ndarray, " pairs"]  # the row that each pair comes from
    dropped: int  # pairs that had nothing to score
    doubts: tuple[Doubt, ...] = ()  # what is surely not meant
    limits: Limits | None = None  # what they were cut to; None: nobody knows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Int64[np.ndarray, " sequences"]:
        """Tokens of each sequence, prompt included."""
        return np.diff(self.offsets)

    @property
    def num_scored(self) -> Int64[np.ndarray, " sequences"]:
        """Scored tokens of each sequence."""
        return self.lengths - self.score_start

    @property
    def max_id(self) -> int:
        """The largest token id, which the model's vocabulary must hold."""
        return int(self.tokens.max())
