"""Preference pairs as token ids: what tokenisation makes and batches are made of."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

# Which tokens of a completion are scored: all, the assistant's turns, or its last one.
Score = Literal["completion", "assistant", "last_turn"]

# Why a pair is left out.
NOTHING, CUT_AWAY, WEIGHTLESS = "nothing to score", "cut away", "weight 0"


class Doubt(NamedTuple):
    """Something surely not meant, in `num_rows` rows, the first of them row `first`."""

    kind: str  # a key of doubts.MEANINGS
    num_rows: int
    first: int
    example: str = ""  # of it, where there is one to show


class Drop(NamedTuple):
    """Pairs that are left out, `num_pairs` of them; the first is of row `first`."""

    reason: str  # NOTHING, CUT_AWAY or WEIGHTLESS
    num_pairs: int
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

    Sequence i is tokens[offsets[i]:offsets[i + 1]]. Its completion begins at its token
    completion_start[i], which has a token before it (completion_start >= 1); of the
    completion at least one token is scored, and of the prompt none.
    """

    tokens: Int32[np.ndarray, " tokens"]
    scored: Bool[np.ndarray, " tokens"]  # whether its log-probability counts
    offsets: Int64[np.ndarray, " bounds"]
    completion_start: Int32[np.ndarray, " sequences"]
    rows: Int64[np.ndarray, " pairs"]  # the row that each pair comes from
    weights: Float32[np.ndarray, " pairs"]  # a pair counts so many times; > 0, finite
    drops: tuple[Drop, ...] = ()  # pairs that are left out, one for each reason
    # Tokens left out in front (behind a BOS that stays) and behind; None: nobody knows.
    cut: Int32[np.ndarray, "sequences 2"] | None = None
    doubts: tuple[Doubt, ...] = ()  # what is surely not meant
    limits: Limits | None = None  # what they were cut to; None: nobody knows
    score: Score | None = None  # what is scored of them; None: nobody knows
    # The reference's log-probabilities of chosen and rejected, where they are known.
    ref_logps: Float32[np.ndarray, "pairs 2"] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dropped(self) -> int:
        """Pairs that have nothing to score."""
        return sum(x.num_pairs for x in self.drops) - self.weightless

    @property
    def weightless(self) -> int:
        """Pairs left out because their weight is 0."""
        return sum(x.num_pairs for x in self.drops if x.reason == WEIGHTLESS)

    @property
    def lengths(self) -> Int64[np.ndarray, " sequences"]:
        """Tokens of each sequence, prompt included."""
        return np.diff(self.offsets)

    @property
    def num_scored(self) -> Int64[np.ndarray, " sequences"]:
        """Scored tokens of each sequence."""
        # No sequence is empty, which reduceat would take for one of one token.
        return np.add.reduceat(self.scored, self.offsets[:-1], dtype=np.int64)

    @property
    def max_id(self) -> int:
        """The largest token id, which the model's vocabulary must hold."""
        return int(self.tokens.max())

    def ref_logps_of(
        self, members: Int64[np.ndarray, "A N P"]
    ) -> Float32[np.ndarray, "A N 2 P"] | None:
        """The reference's of these pairs, 0 for a padding pair (-1), if it is known."""
        if self.ref_logps is None:
            return None
        values = np.where(members[..., None] >= 0, self.ref_logps[members], 0)
        return np.ascontiguousarray(values.swapaxes(2, 3), np.float32)
