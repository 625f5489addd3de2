"""Preference data, front door: rows -> conversations -> tokens -> pairs -> `Batch`."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from engine.data import cache as token_cache
from engine.data import reference_logps
from engine.data.doubts import report, warn_beyond_positions
from engine.data.drops import drop_reason
from engine.data.pair_tokens import Limits, PairTokens, Score
from engine.data.rows import PreferenceRows, as_rows
from engine.data.sources import load_mixture
from engine.data.templates import ChatTemplate
from engine.data.tokenization import encode_pairs
from engine.errors import InputError
from engine.paths import as_path

__all__ = [
    "Limits",
    "PairTokens",
    "PreferenceRows",
    "check_limits",
    "load_mixture",
    "tokenize_pairs",
    "warn_beyond_positions",
]

logger = logging.getLogger(__name__)


def tokenize_pairs(
    dataset: PreferenceRows | datasets.Dataset | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    truncation_mode: str = "keep_start",
    score: Score = "completion",
    tools: Sequence[Mapping[str, Any]] | None = None,
    cache_dir: str | Path | None = None,
) -> PairTokens:
    """Tokens of every pair that has something to score, read from disk if known.

    A prompt over `max_prompt_length` loses tokens behind its BOS, a completion over
    `max_completion_length` its last ones; what is still over `max_length` is cut on
    the right (keep_start) or, BOS included, on the left (keep_end).

    Args:
        dataset: what `load_mixture` returns, a `datasets.Dataset`, or a list of rows.
        score: which tokens of a completion are scored: all, those of the assistant's
            messages, or of its last one; none of a message whose loss_weight is 0.
        tools: for the chat template, where a row has none of its own.
        cache_dir: where tokenised data is kept; None is $DPO_CACHE, or
            ~/.cache/dpo_engine.
    Raises:
        InputError: a row that is not a preference pair (file, row, field), or no pair
            with anything to score.
    """
    rows = as_rows(dataset)
    limits = Limits(
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        max_length=max_length,
        truncation_mode=truncation_mode,
    )
    ChatTemplate(tokenizer).warn_of_date()
    key = token_cache.cache_key(rows, tokenizer, limits, score, tools)
    root = token_cache.default_cache_dir() if cache_dir is None else as_path(cache_dir)
    path = root / "tokens" / f"{key}.arrow"
    pairs = token_cache.load(path, limits, score)
    if pairs is None:
        began = time.perf_counter()
        pairs = encode_pairs(rows, tokenizer, limits, score, tools)
        seconds = time.perf_counter() - began
        logger.info("tokenised %d pairs in %.1f s", len(pairs), seconds)
        token_cache.store(path, pairs)
        # From here on they are on disk only, where the folder takes them.
        pairs = token_cache.load(path, limits, score) or pairs
    else:
        logger.info("read %d tokenised pairs from %s", len(pairs), path)
    report(pairs.doubts, rows)
    total = len(pairs) + pairs.dropped + pairs.weightless
    for reason, count, first in pairs.drops:
        logger.warning(
            "%d of %d pairs are dropped (the first: %s): %s",
            count,
            total,
            rows.where(first),
            drop_reason(reason, limits),
        )
    return reference_logps.with_columns(pairs, rows)


def check_limits(
    pairs: PairTokens,
    limits: Limits,
    score: Score = "completion",
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Refuses options that tokens were not made by, as nothing applies them.

    Raises:
        InputError: naming the option; or, where it is not known what the pairs were cut
            by, one that is longer than max_length.
    """
    if score != (pairs.score or "completion"):
        raise InputError(
            f"score={score!r} has no effect on data that is tokenised (with score="
            f"{pairs.score or 'completion'!r}); give tokenize_pairs the same, or give "
            "the trainer the rows"
        )
    if tools is not None:
        raise InputError(
            "tools has no effect on data that is tokenised; give it to tokenize_pairs"
        )
    if pairs.limits is None:
        longest = int(pairs.lengths.max())
        if limits.max_length is not None and longest > limits.max_length:
            raise InputError(
                f"max_length={limits.max_length} has no effect on data that is "
                f"tokenised: its longest sequence has {longest} tokens; cut it before"
            )
        return
    for name, wanted, found in zip(Limits._fields, limits, pairs.limits, strict=True):
        if wanted != found:
            raise InputError(
                f"{name}={wanted!r} has no effect on data that is tokenised: it was "
                f"cut with {name}={found!r}; give tokenize_pairs and the trainer the "
                "same, or give the trainer the rows"
            )
