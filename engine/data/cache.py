"""Tokenised pairs on disk, under a key made of everything that they depend on.

A file is an Arrow stream with one row a sequence (even rows chosen, odd rows rejected),
read through a memory map, so that tokens take no memory of a process, and a checksum
of all that at its end.
"""

import hashlib
import json
import logging
import mmap
import os
import struct
import tempfile
import zlib
from collections.abc import Buffer, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from engine.data.pair_tokens import Doubt, Drop, Limits, PairTokens, Score
from engine.data.rows import PreferenceRows
from engine.paths import as_path

logger = logging.getLogger(__name__)

_FORMAT = b"pair-tokens-5"  # change it when the same rows give other pairs than before
_SCHEMA = pa.schema(
    {
        "tokens": pa.large_list(pa.int32()),
        # 0 or 1: a byte each, since Arrow's own eighth of one could not be mapped.
        "scored": pa.large_list(pa.uint8()),
        "completion_start": pa.int32(),
        "cut_in_front": pa.int32(),
        "cut_behind": pa.int32(),
        "row": pa.int64(),
        "weight": pa.float32(),
    }
)
_CHECKSUM = struct.Struct("<I")  # CRC-32 of all bytes before it
_BLOCK = 2**24  # bytes of a file summed at a time


def default_cache_dir() -> Path:
    """$DPO_CACHE, or ~/.cache/dpo_engine."""
    return as_path(os.environ.get("DPO_CACHE") or "~/.cache/dpo_engine")


def cache_key(
    rows: PreferenceRows,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    score: Score = "completion",
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """A hash of the rows' content and order, the tokenizer and the options."""
    digest = hashlib.blake2b(_FORMAT, digest_size=16)
    digest.update(repr((tuple(limits), score)).encode())
    digest.update(json.dumps(tools, default=repr).encode() + b"\0")
    _feed_tokenizer(digest.update, tokenizer)
    rows.update_hash(digest.update)
    return digest.hexdigest()


def load(
    path: Path, limits: Limits | None = None, score: Score | None = None
) -> PairTokens | None:
    """The pairs in a file; None where there is none, or (logged) a damaged one.

    The arrays are read-only and stay on disk. `limits` are what they were cut to, and
    `score` is what is scored of them.
    """
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        pairs = _read(memoryview(mapped))
        return replace(pairs, limits=limits, score=score)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, pa.ArrowException) as error:
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
                _write(file, pairs)
                os.replace(file.name, path)
            finally:
                Path(file.name).unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the tokenised data is not kept in %s: %s", path.parent, error)


class _Summed:
    """A file that is written to, and the checksum of what was written."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.checksum = 0
        self.closed = False

    def write(self, data: Buffer) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return self._file.write(data)

    def flush(self):
        self._file.flush()


def _write(file: IO[bytes], pairs: PairTokens):
    facts = {"drops": pairs.drops, "doubts": pairs.doubts}
    assert pairs.cut is not None, "only what was tokenised here is kept"
    schema = _SCHEMA.with_metadata({"facts": json.dumps(facts)})
    columns = [
        *(
            pa.LargeListArray.from_arrays(pa.array(pairs.offsets), pa.array(values))
            for values in (pairs.tokens, pairs.scored.view(np.uint8))
        ),
        pa.array(pairs.completion_start),
        *(pa.array(np.ascontiguousarray(side)) for side in pairs.cut.T),
        pa.array(pairs.rows.repeat(2)),
        pa.array(pairs.weights.repeat(2)),
    ]
    summed = _Summed(file)
    with pa.ipc.new_stream(summed, schema) as stream:
        stream.write_batch(pa.record_batch(columns, schema=schema))
    file.write(_CHECKSUM.pack(summed.checksum))
    file.flush()


def _read(data: memoryview) -> PairTokens:
    """The pairs of a whole file.

    Raises:
        ValueError, OSError, ArrowException: it is not one that `store` wrote.
    """
    content, tail = data[: -_CHECKSUM.size], data[-_CHECKSUM.size :]
    checksum = 0
    for start in range(0, len(content), _BLOCK):
        checksum = zlib.crc32(content[start : start + _BLOCK], checksum)
    # Nothing is parsed before every byte is known to be what was written.
    if tail != _CHECKSUM.pack(checksum):
        raise ValueError("its checksum is another")
    with pa.ipc.open_stream(pa.py_buffer(content)) as stream:
        if not stream.schema.equals(_SCHEMA):
            raise ValueError("it has other columns")
        facts = json.loads((stream.schema.metadata or {})[b"facts"])
        batch = stream.read_next_batch()
    batch.validate()
    tokens, scored, completion_start, front, behind, row, weight = batch.columns
    assert isinstance(tokens, pa.LargeListArray)
    assert isinstance(scored, pa.LargeListArray)
    marks = scored.values.to_numpy()
    if not scored.offsets.equals(tokens.offsets) or marks.max(initial=0) > 1:
        raise ValueError("its parts do not fit together")
    pairs = PairTokens(
        tokens=tokens.values.to_numpy(),
        scored=marks.view(np.bool_),
        offsets=tokens.offsets.to_numpy(),
        completion_start=completion_start.to_numpy(),
        rows=row.to_numpy()[::2],
        weights=weight.to_numpy()[::2],
        drops=tuple(Drop(*drop) for drop in facts["drops"]),
        cut=np.stack([front.to_numpy(), behind.to_numpy()], axis=1),
        doubts=tuple(Doubt(*doubt) for doubt in facts["doubts"]),
    )
    _check(pairs, row.to_numpy()[1::2], weight.to_numpy()[1::2])
    return pairs


def _check(pairs: PairTokens, odd_rows: np.ndarray, odd_weights: np.ndarray):
    """Refuses arrays that are no pairs, whoever has written them."""
    sound = (
        np.array_equal(pairs.rows, odd_rows)
        and np.array_equal(pairs.weights, odd_weights)
        and len(pairs) > 0
        and pairs.offsets[0] == 0
        and pairs.offsets[-1] == len(pairs.tokens)
        and bool((pairs.completion_start >= 1).all())
        and bool((pairs.lengths > pairs.completion_start).all())
        and (pairs.cut is None or bool((pairs.cut >= 0).all()))
        and bool(((0 < pairs.weights) & (pairs.weights < np.inf)).all())
        and _only_completions_are_scored(pairs)
    )
    if not sound:
        raise ValueError("its parts do not fit together")


def _only_completions_are_scored(pairs: PairTokens) -> bool:
    """That no prompt has a scored token, and each completion has."""
    start = pairs.offsets[:-1]
    bounds = np.stack([start, start + pairs.completion_start], axis=1).ravel()
    counts = np.add.reduceat(pairs.scored, bounds, dtype=np.int64).reshape(-1, 2)
    return bool((counts[:, 0] == 0).all() and (counts[:, 1] > 0).all())


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
