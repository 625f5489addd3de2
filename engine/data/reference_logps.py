"""The reference's log-probabilities where the data brings them: two columns of it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
from jaxtyping import Float32

from engine.config.dpo import DPOConfig
from engine.data.columns import REFERENCE
from engine.data.pair_tokens import PairTokens
from engine.data.rows import PreferenceRows, Source
from engine.data.stages import reading
from engine.errors import InputError, shown


def with_columns(pairs: PairTokens, rows: PreferenceRows) -> PairTokens:
    """The pairs with `ref_logps` where the rows have columns of them.

    Raises:
        InputError: a row without both, or whose value is no log-probability.
    """
    there = [any(_has(source, name) for name in REFERENCE) for source in rows.sources]
    if not any(there):
        return pairs
    values = np.empty((len(rows), 2), np.float32)
    for number, source in enumerate(rows.sources):
        places = np.flatnonzero(rows.source_ids == number)
        for column, name in enumerate(REFERENCE):
            found = _values(source, name, rows.indices[places].tolist())
            for place, value in zip(places.tolist(), found, strict=True):
                values[place, column] = _checked(value, name, rows.where(place))
    again = np.flatnonzero(np.bincount(pairs.rows) > 1)
    if len(again):
        raise InputError(
            f"{rows.where(int(again[0]))}, has several pairs and one {REFERENCE[1]}; "
            "give each pair a row of its own"
        )
    return dataclasses.replace(pairs, ref_logps=values[pairs.rows])


def check_values(
    arguments: DPOConfig, sets: Mapping[str, PairTokens], *, has_reference: bool
) -> None:
    """Refuse the reference's log-probabilities in data where they mean nothing.

    Raises:
        InputError: naming the data set, or the option that they make meaningless.
    """
    having = [name for name, pairs in sets.items() if pairs.ref_logps is not None]
    if not having:
        return
    columns = f"the columns ref_chosen_logps and ref_rejected_logps of {having[0]}"
    option = arguments.without_reference
    for name in ("sync_ref_model", "offload_ref_model"):
        option = option or (f"{name}=True" if getattr(arguments, name) else None)
    if option:
        raise InputError(f"{columns} have no effect with {option}; remove one")
    if len(having) < len(sets):
        if not arguments.precompute_ref_log_probs:
            without = next(name for name in sets if name not in having)
            raise InputError(
                f"{without} has no columns like {columns}; give it some, or set "
                "precompute_ref_log_probs to true to score it"
            )
    elif has_reference:
        raise InputError(
            f"reference_model has no effect, as {columns} are its log-probabilities; "
            "remove one"
        )


def _has(source: Source, name: str) -> bool:
    if isinstance(source.data, datasets.Dataset):
        return name in source.data.column_names
    return any(name in row for row in source.data)


def _values(source: Source, name: str, indices: list[int]) -> list[Any]:
    """Of these rows; None where a row has none."""
    if isinstance(source.data, datasets.Dataset):
        if name not in source.data.column_names:
            return [None] * len(indices)
        with reading(f"{source.name}: rows cannot be read"):
            column = source.data.select_columns([name])[indices]
        return column[name]
    return [source.data[i].get(name) for i in indices]


def _checked(value: Any, name: str, where: str) -> Float32[np.ndarray, ""] | float:
    wanted = (
        "give every row the reference's log-probability of its completion, a sum in "
        "nats, or no row"
    )
    if value is None:
        raise InputError(f"{where}, has no {name}, and another row has; {wanted}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{where}, {name}={shown(value)} is not a number; {wanted}")
    if not math.isfinite(value) or not -float(np.finfo(np.float32).max) <= value <= 0:
        raise InputError(
            f"{where}, {name}={shown(value)} must be finite and at most 0; {wanted}"
        )
    return value
