"""Pairs of a stream of rows: tokenised as they pass, and shuffled among a few."""

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32
from transformers import PreTrainedTokenizerBase

from engine.data.batches import prefetch
from engine.data.columns import REFERENCE
from engine.data.doubts import warn
from engine.data.drops import drop_reason, merged, reasons
from engine.data.pair_tokens import Drop, Limits, PairTokens, Score
from engine.data.row_streams import Chunk, RowStream
from engine.data.templates import ChatTemplate
from engine.data.tokenization import PairEncoder
from engine.errors import InputError

logger = logging.getLogger(__name__)

_AHEAD = 2  # chunks of rows that are tokenised before they are asked for


class Pair(NamedTuple):
    """One pair's tokens, the chosen sequence's first."""

    tokens: Int32[np.ndarray, " tokens"]
    scored: Bool[np.ndarray, " tokens"]
    chosen: int  # tokens of the chosen sequence
    completion_start: tuple[int, int]  # of each sequence
    row: int  # of the pass
    weight: float


@dataclass(frozen=True, eq=False, kw_only=True)
class PairStream:
    """Tokenised pairs of rows that are read anew in each pass, and not kept."""

    rows: RowStream
    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    score: Score = "completion"
    tools: Sequence[Mapping[str, Any]] | None = None
    # Looks at the pairs of some rows before they are used; may refuse them.
    check: Callable[[PairTokens, Chunk], None] = lambda pairs, chunk: None

    @cached_property
    def head(self) -> tuple[Chunk, PairTokens]:
        """The first rows and their pairs, all checked.

        Raises:
            InputError: what training would refuse of these rows.
        """
        ChatTemplate(self.tokenizer).warn_of_date()
        chunk = next(self.rows.chunks(0), None)
        assert chunk is not None, "a source without rows is refused"
        encode = self._encoder()
        pairs = self._encode(encode, chunk)
        return chunk, replace(pairs, doubts=encode.doubts.found())

    def _encoder(self) -> PairEncoder:
        return PairEncoder(self.tokenizer, self.limits, self.score, self.tools)

    def _encode(self, encode: PairEncoder, chunk: Chunk) -> PairTokens:
        for i, row in enumerate(chunk.rows):
            for column in REFERENCE:
                if column in row:
                    raise InputError(
                        f"{chunk.where(chunk.first + i)}, has the column {column}, "
                        "which is not used of a data set that is streamed; remove it"
                    )
        pairs = encode(chunk.first, chunk.rows, chunk)
        self.check(pairs, chunk)
        return pairs

    def pairs(self, number: int) -> Generator[Pair]:
        """The pairs of a pass (0, 1, ...) in the order of their rows.

        They are tokenised in a thread, a few ahead. What is dropped or doubted is said
        in the first pass: where it is first met, and how often at the end.

        Raises:
            InputError: a row that is no preference pair, when it is met; or, at the
                end, that there was no pair with a token to score.
        """
        found = _Found(self.limits, self.rows.name, tell=number == 0)
        with contextlib.closing(prefetch(self._parts(number, found), _AHEAD)) as parts:
            try:
                for part in parts:
                    yield from part
            except GeneratorExit:
                found.tell_all("so far")
                raise
        found.check_some()
        found.tell_all("in all")

    def _parts(self, number: int, found: "_Found") -> Iterator[list[Pair]]:
        encode = self._encoder()
        for chunk in self.rows.chunks(number):
            pairs = self._encode(encode, chunk)
            found.add(chunk, pairs, encode)
            yield list(_split(pairs))

    def drawn(self, number: int, seed: int | None) -> Generator[Pair]:
        """The pairs of a pass, each drawn from among `rows.buffer` of them.

        Args:
            seed: of the draws; None: the pairs keep their order.
        """
        size = 1 if seed is None else self.rows.buffer
        rng = np.random.default_rng((seed or 0, number))
        held: list[Pair] = []
        with contextlib.closing(self.pairs(number)) as pairs:
            for pair in pairs:
                if len(held) < size:
                    held.append(pair)
                    continue
                place = int(rng.integers(size))
                taken, held[place] = held[place], pair
                yield taken
        for place in rng.permutation(len(held)).tolist():
            yield held[place]


class _Found:
    """What was left out, and what is surely not meant, in a pass so far."""

    def __init__(self, limits: Limits, name: str, *, tell: bool):
        self._limits, self._name, self._tell = limits, name, tell
        self._said: set[str] = set()
        self._rows = self._pairs = 0
        self._drops: tuple[Drop, ...] = ()
        self._encode: PairEncoder | None = None

    def add(self, chunk: Chunk, pairs: PairTokens, encode: PairEncoder):
        """Counts the pairs of some rows, and says what is new."""
        self._encode = encode
        self._rows += len(chunk.rows)
        self._pairs += len(pairs)
        self._drops = merged((*self._drops, *pairs.drops))
        if not self._tell:
            return
        for drop in pairs.drops:
            if drop.reason not in self._said:
                self._said.add(drop.reason)
                logger.warning(
                    "a pair of %s is dropped (others like it are counted): %s",
                    chunk.where(drop.first),
                    drop_reason(drop.reason, self._limits),
                )
        for doubt in encode.doubts.found():
            if doubt.kind not in self._said:
                self._said.add(doubt.kind)
                of = f"the first {self._rows} rows"
                warn(doubt, of, chunk, chunk.ignored(doubt.first))

    def check_some(self):
        """Refuses a pass without a pair.

        Raises:
            InputError: saying why pairs are dropped.
        """
        if not self._pairs:
            dropped = sum(drop.num_pairs for drop in self._drops)
            raise InputError(
                f"none of the {dropped} pairs has a token to score: "
                f"{reasons(self._drops, self._limits)}"
            )

    def tell_all(self, when: str):
        """One line: how many rows there were, and what was said of how many."""
        if not self._tell or self._encode is None:
            return
        counts = [f"{x.num_pairs} dropped ({x.reason})" for x in self._drops]
        doubts = self._encode.doubts.found()
        counts += [f"{doubt.num_rows} rows in doubt ({doubt.kind})" for doubt in doubts]
        logger.info(
            "%s: %d rows read %s, %d pairs%s",
            self._name,
            self._rows,
            when,
            self._pairs,
            "".join(f", {count}" for count in counts),
        )


def _split(pairs: PairTokens) -> Iterator[Pair]:
    """Each with arrays of its own, so that no pair keeps its neighbours in memory."""
    bounds = pairs.offsets.tolist()
    starts = pairs.completion_start.tolist()
    for p, (row, weight) in enumerate(
        zip(pairs.rows.tolist(), pairs.weights.tolist(), strict=True)
    ):
        start, middle, end = bounds[2 * p : 2 * p + 3]
        yield Pair(
            tokens=pairs.tokens[start:end].copy(),
            scored=pairs.scored[start:end].copy(),
            chosen=middle - start,
            completion_start=(starts[2 * p], starts[2 * p + 1]),
            row=row,
            weight=weight,
        )


def joined(pairs: Sequence[Pair]) -> PairTokens:
    """Some pairs, at least one, in this order."""
    lengths = [(pair.chosen, len(pair.tokens) - pair.chosen) for pair in pairs]
    return PairTokens(
        tokens=np.concatenate([pair.tokens for pair in pairs]),
        scored=np.concatenate([pair.scored for pair in pairs]),
        offsets=np.cumsum([0, *(x for both in lengths for x in both)]),
        completion_start=np.array(
            [x for pair in pairs for x in pair.completion_start], np.int32
        ),
        rows=np.array([pair.row for pair in pairs]),
        weights=np.array([pair.weight for pair in pairs], np.float32),
    )
