"""Rows that are token ids already: they are taken as they are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.data.columns import MASKS, Form
from engine.data.messages import kind, short
from engine.errors import InputError


@dataclass(frozen=True, kw_only=True)
class PairIds:
    """A pair that is token ids; the prompt is in neither completion."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    weight: float = 1.0


def read_id_pairs(
    row: Mapping[str, Any], form: Form, weight: float, where: str
) -> list[PairIds]:
    """The pairs of a row of ids: one for each list of rejected ones.

    Raises:
        InputError: what are no ids; it begins with `where`.
    """
    prompt, chosen, rejected = form.needs
    for name in form.needs:
        if row.get(name) is None:
            raise InputError(
                f"{where}, has no {name!r}; tokenised rows need {', '.join(form.needs)}"
            )
    first = [
        _token_ids(row[name], row.get(mask) if form.may_have else None, name, where)
        for name, mask in zip((prompt, chosen), MASKS, strict=False)
    ]
    mask = row.get(MASKS[2]) if form.may_have else None
    several = row[rejected]
    if not (_is_list(several) and len(several) and _is_list(several[0])):
        several, mask = [several], mask if mask is None else [mask]
    masks = [None] * len(several) if mask is None else mask
    if not _is_list(masks):
        raise InputError(
            f"{where}, field {MASKS[2]!r}, is {kind(masks)}; {rejected} has several "
            "lists of token ids, and it must have a list of zeros and ones for each"
        )
    if len(masks) != len(several):
        raise InputError(
            f"{where}, field {MASKS[2]!r}, has {len(masks)} entries, but {rejected} "
            f"has {len(several)}; give one for each"
        )
    return [
        PairIds(
            prompt=first[0],
            chosen=first[1],
            rejected=_token_ids(other, of_it, rejected, where),
            weight=weight,
        )
        for other, of_it in zip(several, masks, strict=True)
    ]


def _is_list(value: Any) -> bool:
    """Whether it is a sequence of values, and no text or bytes."""
    if isinstance(value, str | bytes | bytearray):
        return False
    return isinstance(value, Sequence | np.ndarray)


def _token_ids(value: Any, mask: Any, field: str, where: str) -> list[int]:
    """Ids without those that an attention mask of zeros calls padding."""
    place = f"{where}, field {field!r}"
    if not _is_list(value):
        raise InputError(f"{place}, is {kind(value)}; it must be a list of token ids")
    for number, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise InputError(
                f"{place}, entry {number}, is {short(token)}; token ids are whole "
                "numbers"
            )
    ids = [int(token) for token in value]
    if mask is None:
        return ids
    numbers = int | float | np.number | np.bool_
    bits = _is_list(mask) and all(
        isinstance(real, numbers) and real in (0, 1) for real in mask
    )
    if not bits or len(mask) != len(ids):
        raise InputError(
            f"{place}, has {len(ids)} ids, whose attention mask must be as many zeros "
            "and ones; leave it out if nothing is padded"
        )
    return [token for token, real in zip(ids, mask, strict=True) if real]
