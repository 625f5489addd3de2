"""Pairs that say the same: equal ones, contradictions, and near-duplicates."""

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt32, UInt64

from engine.data.encoder import ragged_arange
from engine.data.pair_tokens import PairTokens

NEAR = 0.8  # from this share of common shingles on, two pairs are near-duplicates
SHINGLE = 5  # tokens of one
_COMMON = 0.05  # of a prompt, what more than this share of all pairs has is not counted
_FEW = 4  # ... and more than so many
_BINS = 128  # minima kept of each pair: an estimate is good to 0.04
_BAND = 8  # of them make a band; pairs that share one are compared
_CHUNK = 2**18  # tokens looked at together
_COUNTERS = 22  # bits of a shingle that choose its counter
_EMPTY = np.uint32(2**32 - 1)
_SAMPLE = 4096  # pairs among which common shingles are looked for
_RANDOM = np.random.default_rng(0).integers(2**64, size=SHINGLE + 3, dtype=np.uint64)
_FACTORS, _KINDS = _RANDOM[:SHINGLE] | np.uint64(1), _RANDOM[SHINGLE:]


class Match(NamedTuple):
    """Pairs that repeat an earlier one; `first` and `of` are the first of them."""

    number: int
    first: int = -1  # a pair, and below the earlier one that it repeats
    of: int = -1


class Similar(NamedTuple):
    """How often pairs repeat, or contradict, an earlier pair of the same data."""

    equal: Match  # prompt, chosen and rejected
    swapped: Match  # chosen and rejected the other way round
    near: Match  # shingles, and not equal
    prompts: int  # different ones


class Digests(NamedTuple):
    """Pairs by what they hold, as 64-bit hashes."""

    prompt: UInt64[np.ndarray, " pairs"]  # of the chosen side
    sides: UInt64[np.ndarray, "pairs 2"]  # whole sequences


def digests(pairs: PairTokens) -> Digests:
    """A hash of each pair's prompt, and one of each of its sequences."""
    tokens = np.ascontiguousarray(pairs.tokens, np.int32)
    starts = pairs.offsets[:-1]
    ends = starts + pairs.completion_start
    prompt = _hashes(tokens, starts[::2], ends[::2])
    return Digests(prompt, _hashes(tokens, starts, pairs.offsets[1:]).reshape(-1, 2))


def _hashes(
    tokens: np.ndarray, starts: np.ndarray, ends: np.ndarray
) -> UInt64[np.ndarray, " parts"]:
    view = memoryview(tokens).cast("B")
    found = b"".join(
        hashlib.blake2b(view[4 * start : 4 * end], digest_size=8).digest()
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    )
    return np.frombuffer(found, np.uint64)


def similar(pairs: PairTokens, found: Digests) -> Similar:
    """What `found`, the digests of `pairs`, and their shingles have in common.

    Two pairs are near-duplicates where they share four fifths of their shingles: every
    five tokens in a row of the prompt, of chosen and of rejected (the Jaccard index,
    estimated by MinHash). What more than a twentieth of all prompts hold, as system
    messages and templates are, does not count.
    """
    sides = found.sides
    equal = _repeats(sides)
    return Similar(
        equal=_match(equal),
        swapped=_match(_contradicted(sides)),
        near=_match(np.where(equal >= 0, -1, _near(pairs))),
        prompts=len(np.unique(found.prompt)),
    )


class Shared(NamedTuple):
    """What an evaluation has that the training data has too."""

    pairs: Match  # `of` is a pair of the training data
    prompts: Match


def shared(train: Digests, evaluation: Digests) -> Shared:
    """Pairs, and prompts, of the evaluation that are in the training data."""
    whole = [x.sides[:, 0] * np.uint64(3) + x.sides[:, 1] for x in (train, evaluation)]
    return Shared(
        pairs=_match(_places(whole[1], whole[0])),
        prompts=_match(_places(evaluation.prompt, train.prompt)),
    )


def _places(
    keys: UInt64[np.ndarray, " n"], among: UInt64[np.ndarray, " m"]
) -> Int64[np.ndarray, " n"]:
    """Where each key is first among others; -1 where it is not."""
    different, first = np.unique(among, return_index=True)
    at = np.minimum(np.searchsorted(different, keys), len(different) - 1)
    return np.where(different[at] == keys, first[at], -1)


def _match(earlier: Int64[np.ndarray, " pairs"]) -> Match:
    which = np.flatnonzero(earlier >= 0)
    if len(which) == 0:
        return Match(0)
    return Match(len(which), int(which[0]), int(earlier[which[0]]))


def _repeats(keys: UInt64[np.ndarray, "pairs 2"]) -> Int64[np.ndarray, " pairs"]:
    """The first pair with the same keys, where it is an earlier one; else -1."""
    _, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    earlier = first[which.reshape(-1)]
    return np.where(earlier < np.arange(len(keys)), earlier, -1)


def _contradicted(sides: UInt64[np.ndarray, "pairs 2"]) -> Int64[np.ndarray, " pairs"]:
    """An earlier pair with these sides the other way round; else -1."""
    of: dict[tuple[int, int], int] = {}
    earlier = np.full(len(sides), -1)
    for p, (chosen, rejected) in enumerate(sides.tolist()):
        if chosen != rejected:
            earlier[p] = of.get((rejected, chosen), -1)
            of.setdefault((chosen, rejected), p)
    return earlier


def _near(pairs: PairTokens) -> Int64[np.ndarray, " pairs"]:
    """An earlier pair with nearly the same shingles; else -1."""
    minima = _minima(pairs)
    earlier = np.full(len(pairs), -1)
    order = np.arange(len(pairs))
    for start in range(0, _BINS, _BAND):
        band = np.ascontiguousarray(minima[:, start : start + _BAND])
        _, first, which = np.unique(
            band.view(f"V{band.itemsize * _BAND}").ravel(),
            return_index=True,
            return_inverse=True,
        )
        # Each is compared with the first of its band: of n pairs that share one, n - 1
        # comparisons, not the square.
        other = first[which.reshape(-1)]
        places = np.flatnonzero((other < order) & (earlier < 0))
        alike = (minima[places] == minima[other[places]]).mean(axis=1) >= NEAR
        earlier[places[alike]] = other[places[alike]]
    return earlier


def _minima(pairs: PairTokens) -> UInt32[np.ndarray, "pairs bins"]:
    """Of each pair's shingles the least hash in each bin that hashes choose.

    One hash a shingle instead of one for each minimum (Li, Owen and Zhang 2012,
    arXiv:1208.1259); an empty bin takes the next one's, marked by the distance
    (Shrivastava and Li 2014, arXiv:1406.4784).
    """
    size = len(pairs)
    common = _common(pairs)
    minima = np.full((size, _BINS), _EMPTY)
    for first, last in _chunks(pairs):
        owner, hashes, of_prompt = _shingles(pairs, first, last)
        counted = ~(of_prompt & common[hashes >> np.uint64(64 - _COUNTERS)])
        owner, hashes = owner[counted], hashes[counted]
        place = owner * _BINS + (hashes % np.uint64(_BINS)).astype(np.int64)
        value = (hashes >> np.uint64(16)).astype(np.uint32)
        np.minimum.at(minima[first:last].reshape(-1), place, value)
    filled = minima != _EMPTY
    result = minima.copy()
    for step in range(1, _BINS):
        missing = ~filled
        if not (missing & filled.any(axis=1, keepdims=True)).any():
            break
        next_filled = np.roll(minima != _EMPTY, -step, axis=1) & missing
        borrowed = np.roll(minima, -step, axis=1) + np.uint32(step * 0x9E3779B1 % 2**32)
        result = np.where(next_filled, borrowed, result)
        filled |= next_filled
    return result


def _common(pairs: PairTokens) -> Bool[np.ndarray, " counters"]:
    """Which counters are those of shingles that many prompts hold."""
    sampled = np.unique(np.linspace(0, len(pairs) - 1, _SAMPLE).astype(np.int64))
    counts = np.zeros(2**_COUNTERS, np.int32)
    for p in sampled.tolist():
        _, hashes, of_prompt = _shingles(pairs, p, p + 1)
        # Once a pair, however often it repeats a shingle.
        counts[np.unique(hashes[of_prompt] >> np.uint64(64 - _COUNTERS))] += 1
    return counts > max(_COMMON * len(sampled), _FEW)


def _chunks(pairs: PairTokens) -> list[tuple[int, int]]:
    """Ranges of pairs of about `_CHUNK` tokens each."""
    bounds = pairs.offsets[::2]
    marks = np.arange(0, int(bounds[-1]), _CHUNK)
    edges = np.unique(np.append(np.searchsorted(bounds, marks), len(pairs)))
    return [(int(a), int(b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _shingles(
    pairs: PairTokens, first: int, last: int
) -> tuple[
    Int64[np.ndarray, " shingles"],
    UInt64[np.ndarray, " shingles"],
    Bool[np.ndarray, " shingles"],
]:
    """Of some pairs: the pair of each shingle (from 0), its hash, if it is a prompt's.

    A part of fewer tokens than a shingle is one shingle. The two prompts of a pair are
    one.
    """
    bounds = pairs.offsets[2 * first : 2 * last + 1]
    begin, end = bounds[:-1] - bounds[0], bounds[1:] - bounds[0]
    middle = begin + pairs.completion_start[2 * first : 2 * last]
    starts = np.stack([begin[::2], middle[::2], middle[1::2]], axis=1).ravel()
    ends = np.stack([middle[::2], end[::2], end[1::2]], axis=1).ravel()
    tokens = pairs.tokens[bounds[0] : bounds[-1]].astype(np.uint64) + np.uint64(1)
    # Of the tokens from each place on: a sum of their products with odd numbers.
    sums = np.zeros(len(tokens), np.uint64)
    for step, factor in enumerate(_FACTORS):
        sums[: len(tokens) - step] += tokens[step:] * factor
    whole = ends - starts >= SHINGLE
    count = np.where(whole, ends - starts - (SHINGLE - 1), 1)
    part = np.repeat(np.arange(len(starts)), count)
    hashes = sums[ragged_arange(starts, count)]
    place = (np.cumsum(count) - count)[~whole]
    hashes[place] = 0
    for step, factor in enumerate(_FACTORS):
        inside = starts[~whole] + step < ends[~whole]
        at = np.where(inside, starts[~whole] + step, 0)
        hashes[place] += np.where(inside, tokens[at] * factor, np.uint64(0))
    kind = part % 3  # prompt, chosen, rejected: each shingle counts in its part only
    hashes = _mixed(hashes + _KINDS[kind])
    return part // 3, hashes, kind == 0


def _mixed(x: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """A permutation of 64-bit numbers in which every bit depends on every other.

    Steele, Lea and Flood 2014 (SplitMix64).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
