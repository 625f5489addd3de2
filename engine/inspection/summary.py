"""The numbers of a data set: how long, what is cut and scored, what batches waste."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from engine.data.batches import BatchPlan
from engine.data.pair_tokens import PairTokens


class Lengths(NamedTuple):
    """Of one part of the sequences, in tokens, after cutting."""

    least: int
    median: float
    mean: float
    p95: float
    most: int
    total: int


class Side(NamedTuple):
    """The chosen sequences, or the rejected ones."""

    cut: int  # sequences that lose tokens
    cut_in_front: int
    cut_behind: int  # which lose the end of the text too
    tokens_cut: int
    completion: int  # tokens of completions
    scored: int  # of these


class Shape(NamedTuple):
    """Batches of one compiled shape, in the first epoch of a run."""

    length: int  # to which sequences are padded
    capacity: int  # for scored tokens, on a device
    batches: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What can be said of a data set in numbers."""

    rows: int
    pairs: int
    lengths: dict[str, Lengths]  # prompt, chosen, rejected, sequence
    sides: dict[str, Side]  # chosen, rejected
    pairs_cut: int
    chosen_longer: float  # share of pairs
    rejected_longer: float
    mean_difference: float  # chosen - rejected, in tokens
    weights: tuple[float, float]  # the least and the greatest

    @property
    def tokens(self) -> int:
        """Of all sequences, prompts counted twice."""
        return self.lengths["sequence"].total

    @property
    def scored(self) -> int:
        """Of all sequences."""
        return sum(side.scored for side in self.sides.values())

    @property
    def tokens_cut(self) -> int:
        """Of all sequences."""
        return sum(side.tokens_cut for side in self.sides.values())


@dataclass(frozen=True, kw_only=True)
class Batches:
    """How the first epoch's batches lie in memory."""

    pairs_per_batch: int
    steps: int
    steps_per_epoch: int
    shapes: tuple[Shape, ...]
    padding: float  # share of the tokens that go through the model
    scored_padding: float  # share of the tokens that go through the head


class Parts(NamedTuple):
    """Lengths of every pair, in tokens, as they would be without a limit."""

    prompt: Int64[np.ndarray, " pairs"]
    chosen: Int64[np.ndarray, " pairs"]
    rejected: Int64[np.ndarray, " pairs"]
    longest: Int64[np.ndarray, " pairs"]  # of the two whole sequences


def cuts(pairs: PairTokens) -> Int64[np.ndarray, "pairs 2 2"]:
    """Tokens left out of each side, in front and behind; 0 where nobody knows."""
    if pairs.cut is None:
        return np.zeros((len(pairs), 2, 2), np.int64)
    return pairs.cut.astype(np.int64).reshape(-1, 2, 2)


def parts(pairs: PairTokens) -> Parts:
    """Lengths before cutting (what is cut in front counts as the prompt's)."""
    front, behind = np.moveaxis(cuts(pairs), 2, 0)
    prompt = pairs.completion_start.astype(np.int64).reshape(-1, 2) + front
    whole = pairs.lengths.reshape(-1, 2) + front + behind
    answers = whole - prompt
    return Parts(prompt.max(axis=1), answers[:, 0], answers[:, 1], whole.max(axis=1))


def summarise(pairs: PairTokens, rows: int) -> Summary:
    """The numbers of pairs that were made of so many rows."""
    whole = pairs.lengths.reshape(-1, 2)
    prompt = pairs.completion_start.astype(np.int64).reshape(-1, 2)
    answers = whole - prompt
    scored = pairs.num_scored.reshape(-1, 2)
    cut = cuts(pairs)
    before = parts(pairs)
    difference = before.chosen - before.rejected
    sides = {
        name: Side(
            cut=int(cut[:, i].any(axis=1).sum()),
            cut_in_front=int((cut[:, i, 0] > 0).sum()),
            cut_behind=int((cut[:, i, 1] > 0).sum()),
            tokens_cut=int(cut[:, i].sum()),
            completion=int(answers[:, i].sum()),
            scored=int(scored[:, i].sum()),
        )
        for i, name in enumerate(("chosen", "rejected"))
    }
    return Summary(
        rows=rows,
        pairs=len(pairs),
        lengths={
            "prompt": _lengths(prompt[:, 0]),
            "chosen": _lengths(answers[:, 0]),
            "rejected": _lengths(answers[:, 1]),
            "sequence": _lengths(whole.ravel()),
        },
        sides=sides,
        pairs_cut=int(cut.any(axis=(1, 2)).sum()),
        chosen_longer=float((difference > 0).mean()),
        rejected_longer=float((difference < 0).mean()),
        mean_difference=float(difference.mean()),
        weights=(float(pairs.weights.min()), float(pairs.weights.max())),
    )


def _lengths(values: Int64[np.ndarray, " n"]) -> Lengths:
    median, p95 = np.percentile(values, (50, 95))
    return Lengths(
        least=int(values.min()),
        median=float(median),
        mean=float(values.mean()),
        p95=float(p95),
        most=int(values.max()),
        total=int(values.sum()),
    )


def batches(
    pairs: PairTokens, plan: BatchPlan, shapes: Sequence[tuple[int, int]] | None = None
) -> Batches:
    """What the first epoch of a run is padded to, and what that wastes.

    Args:
        shapes: None: those of the plan.
    """
    shapes = plan.shapes if shapes is None else shapes
    members = plan.order.epoch(0)[: plan.steps]
    longest, most = plan.layout.needs(members)
    which = np.array(
        [
            next(i for i, (s, t) in enumerate(shapes) if a <= s and b <= t)
            for a, b in zip(longest.tolist(), most.tolist(), strict=True)
        ]
    )
    counts = np.bincount(which, minlength=len(shapes))
    length, capacity = np.array(shapes)[which].T
    used = members[members >= 0]
    accumulation, shards, of_shard = plan.layout.grid
    tokens = plan.layout.tokens[used].sum()
    scored = pairs.num_scored.reshape(-1, 2).sum(axis=1)[used].sum()
    rows = accumulation * shards * plan.layout.arrangement.rows(of_shard)
    return Batches(
        pairs_per_batch=plan.order.pairs_per_batch,
        steps=plan.steps,
        steps_per_epoch=plan.order.batches_per_epoch,
        shapes=tuple(
            Shape(s, t, int(n)) for (s, t), n in zip(shapes, counts, strict=True)
        ),
        padding=float(1 - tokens / (rows * length.sum())),
        scored_padding=float(1 - scored / (accumulation * shards * capacity.sum())),
    )
