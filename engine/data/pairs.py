"""Preference data, front door: rows -> conversations -> tokens -> pairs -> `Batch`."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from engine.data import cache as token_cache
from engine.data.rows import PreferenceRows, as_rows
from engine.data.sources import load_mixture
from engine.data.tokenization import Limits, PairTokens, encode_pairs

__all__ = [
    "PairTokens",
    "PreferenceRows",
    "load_mixture",
    "tokenize_pairs",
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
    cache_dir: str | Path | None = None,
) -> PairTokens:
    """Tokens of every pair that has something to score, read from disk if known.

    A prompt over `max_prompt_length` loses tokens behind its BOS, a completion over
    `max_completion_length` its last ones; what is still over `max_length` is cut on
    the right (keep_start) or, BOS included, on the left (keep_end).

    Args:
        dataset: what `load_mixture` returns, a `datasets.Dataset`, or a list of rows.
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
    key = token_cache.cache_key(rows, tokenizer, limits)
    root = token_cache.default_cache_dir() if cache_dir is None else Path(cache_dir)
    path = root / "tokens" / f"{key}.npz"
    pairs = token_cache.load(path)
    if pairs is None:
        began = time.perf_counter()
        pairs = encode_pairs(rows, tokenizer, limits)
        seconds = time.perf_counter() - began
        logger.info("tokenised %d pairs in %.1f s", len(pairs), seconds)
        token_cache.store(path, pairs)
    else:
        logger.info("read %d tokenised pairs from %s", len(pairs), path)
    if pairs.dropped:
        logger.warning(
            "%d of %d pairs are dropped: max_length=%s (%s) leaves nothing to score",
            pairs.dropped,
            len(rows),
            max_length,
            truncation_mode,
        )
    return pairs
