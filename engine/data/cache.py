"""Tokenised pairs on disk, under a key made of everything that they depend on."""

import hashlib
import logging
import os
import struct
import tempfile
import zipfile
from collections.abc import Buffer, Callable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from engine.data.rows import PreferenceRows
from engine.data.tokenization import Limits, PairTokens

logger = logging.getLogger(__name__)

_FORMAT = b"pair-tokens-1"  # change it when the same rows give other arrays than before
# What reading an archive of arrays raises, whichever of its bytes are wrong.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
)
_ARRAYS = {"tokens": "i4", "offsets": "i8", "score_start": "i4", "rows": "i8"}


def default_cache_dir() -> Path:
    """$DPO_CACHE, or ~/.cache/dpo_engine."""
    return Path(os.environ.get("DPO_CACHE") or "~/.cache/dpo_engine").expanduser()


def cache_key(
    rows: PreferenceRows, tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> str:
    """A hash of the rows' content and order, the tokenizer and the limits."""
    digest = hashlib.blake2b(_FORMAT, digest_size=16)
    digest.update(repr(tuple(limits)).encode())
    _feed_tokenizer(digest.update, tokenizer)
    rows.update_hash(digest.update)
    return digest.hexdigest()


def load(path: Path) -> PairTokens | None:
    """The pairs in a file; None where there is none, or (logged) a damaged one."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in (*_ARRAYS, "dropped")}
        return _checked(arrays)
    except FileNotFoundError:
        return None
    except _DAMAGE as error:
        logger.warning("%s is damaged (%s); the data is tokenised again", path, error)
        return None


def store(path: Path, pairs: PairTokens):
    """Writes the file whole or not at all; a folder that refuses it is logged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False
        ) as file:
            try:
                np.savez(
                    file,
                    tokens=pairs.tokens,
                    offsets=pairs.offsets,
                    score_start=pairs.score_start,
                    rows=pairs.rows,
                    dropped=np.int64(pairs.dropped),
                )
                file.flush()
                os.replace(file.name, path)
            finally:
                Path(file.name).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the tokenised data is not kept in %s: %s", path.parent, error)


def _checked(arrays: dict[str, np.ndarray]) -> PairTokens:
    for name, kind in _ARRAYS.items():
        if arrays[name].dtype != np.dtype(kind) or arrays[name].ndim != 1:
            raise ValueError(f"{name} is {arrays[name].dtype}{arrays[name].shape}")
    offsets, score_start = arrays["offsets"], arrays["score_start"]
    sound = (
        len(offsets) == 2 * len(arrays["rows"]) + 1 == len(score_start) + 1
        and offsets[0] == 0
        and offsets[-1] == len(arrays["tokens"])
        and bool((score_start >= 1).all())
        and bool((np.diff(offsets) > score_start).all())
    )
    if not sound:
        raise ValueError("its parts do not fit together")
    return PairTokens(
        tokens=arrays["tokens"],
        offsets=offsets,
        score_start=score_start,
        rows=arrays["rows"],
        dropped=int(arrays["dropped"]),
    )


def _feed_tokenizer(
    update: Callable[[Buffer], object], tokenizer: PreTrainedTokenizerBase
):
    """Gives all that decides over a tokenizer's ids, but not where it was read from."""
    facts = {
        "class": type(tokenizer).__name__,
        "chat_template": tokenizer.chat_template,
        "special": tokenizer.special_tokens_map,
        "split_special_tokens": tokenizer.split_special_tokens,
    }
    update(repr(sorted(facts.items())).encode())
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        # An earlier call's padding and truncation are in it: at worst a file too many.
        update(tokenizer.backend_tokenizer.to_str().encode())
        return
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        for file in sorted(Path(directory).iterdir()):
            update(file.name.encode() + b"\0" + file.read_bytes())
