"""Why pairs are left out, and what to do about it."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Int64

from engine.data.pair_tokens import CUT_AWAY, NOTHING, WEIGHTLESS, Drop, Limits


def drop_reason(reason: str, limits: Limits) -> str:
    """What a `Drop`'s reason means, and what to do about it."""
    if reason == WEIGHTLESS:
        return "their weight is 0, which leaves them out"
    if reason == NOTHING:
        return (
            "chosen or rejected has nothing to score even before it is cut; give each "
            "answer some text, and one of its messages another loss_weight than 0"
        )
    assert reason == CUT_AWAY
    return (
        f"max_length={limits.max_length} ({limits.truncation_mode}) leaves nothing to "
        "score; raise max_length, set max_prompt_length below it, or use keep_end"
    )


def reasons(drops: Iterable[Drop], limits: Limits) -> str:
    """All of them in one phrase: `of 3, ... and of 2, ...`."""
    return " and ".join(
        f"of {drop.num_pairs}, {drop_reason(drop.reason, limits)}" for drop in drops
    )


def of_rows(reason: str, rows: Int64[np.ndarray, " n"]) -> tuple[Drop, ...]:
    """The drop of pairs from these rows; none of no rows."""
    return (Drop(reason, len(rows), int(rows[0])),) if len(rows) else ()


def after_cutting(
    rows: Int64[np.ndarray, " pairs"],
    kept: Int64[np.ndarray, " kept"],
    before: Bool[np.ndarray, " pairs"],
) -> tuple[Drop, ...]:
    """Why all but the pairs `kept` are dropped.

    Args:
        rows: of each pair.
        before: which pairs could be scored before they were cut.
    """
    dropped = np.ones(len(before), np.bool_)
    dropped[kept] = False
    return (
        *of_rows(NOTHING, rows[dropped & ~before]),
        *of_rows(CUT_AWAY, rows[dropped & before]),
    )


def merged(drops: Iterable[Drop]) -> tuple[Drop, ...]:
    """One of each reason; the drops are in the order of their rows."""
    found: dict[str, Drop] = {}
    for drop in drops:
        earlier = found.get(drop.reason, drop._replace(num_pairs=0))
        number = earlier.num_pairs + drop.num_pairs
        found[drop.reason] = earlier._replace(num_pairs=number)
    return tuple(found.values())
