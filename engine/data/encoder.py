"""Texts as token ids: one BOS, one EOS, and rows of different lengths end to end."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64
from transformers import PreTrainedTokenizerBase

from engine.data.conversations import Texts
from engine.data.stages import tokenising


class Ragged(NamedTuple):
    """Rows of different lengths: row i is values[offsets[i]:offsets[i + 1]]."""

    values: Int32[np.ndarray, " values"]
    offsets: Int64[np.ndarray, " bounds"]

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "Ragged":
        """The rows of a list of lists."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = chain.from_iterable(rows)
        return cls(np.fromiter(flat, np.int32, count=int(offsets[-1])), offsets)


class TextEncoder:
    """A tokenizer that writes BOS at most once, and EOS after plain text once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self.bos, self._bos_text = _special(tokenizer.bos_token_id, tokenizer.bos_token)
        self._eos, eos_text = _special(tokenizer.eos_token_id, tokenizer.eos_token)
        bare, whole = self._ids(["a"], False)[0], self._ids(["a"], True)[0]
        grown = len(whole) > len(bare)
        self._adds_bos = grown and whole[:1] == [self.bos] != bare[:1]
        self._adds_eos = grown and whole[-1:] == [self._eos] != bare[-1:]
        # What marks the end of a text; "" where special tokens in a text are not
        # recognised (split_special_tokens), so that the id is appended instead.
        self.eos_text: str | None = None
        if eos_text is not None:
            known = self._ids([eos_text], False)[0] == [self._eos]
            self.eos_text = eos_text if known else ""

    def __call__(self, texts: list[Texts], where: str) -> list[list[list[int]]]:
        """Tokens of each one's prompt, chosen and rejected."""
        found: list[list[list[int]]] = [[]] * len(texts)
        for templated in (False, True):
            places = [
                i for i, t in enumerate(texts) if (t.sides is not None) is templated
            ]
            if not places:
                continue
            flat = [t for i in places for t in (*texts[i][:3],)]
            ids = self._ids(flat, not templated, where)
            if not templated:
                self._mend(flat, ids)
            for k, i in enumerate(places):
                found[i] = ids[3 * k : 3 * k + 3]
        return found

    def rendered(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts that a chat template has rendered."""
        return self._ids(texts, False, "parts of a conversation")

    def _ids(
        self, texts: list[str], add_special_tokens: bool, where: str = "one letter"
    ) -> list[list[int]]:
        with tokenising(where):
            encoded = self._tokenizer(
                texts,
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # lengths above the model's are cut later, or meant
            )
        return encoded["input_ids"]  # pyright: ignore[reportReturnType]

    def _mend(self, texts: list[str], ids: list[list[int]]):
        """One BOS, one EOS; both lists go prompt, chosen, rejected, prompt, ..."""
        for k, (text, row) in enumerate(zip(texts, ids, strict=True)):
            if self._adds_eos:
                row.pop()
            if self._adds_bos and self._bos_text and row[1:2] == [self.bos]:
                # With EOS as BOS, an empty text and its EOS look the same in ids.
                start = texts[k - k % 3] or text[: len(text) - len(self.eos_text or "")]
                if start.lstrip().startswith(self._bos_text):
                    del row[0]
            if k % 3 and self._eos is not None and row[-1:] != [self._eos]:
                row.append(self._eos)


def _special(token_id: Any, text: Any) -> tuple[int | None, str | None]:
    """Id and text of a special token; both None where the tokenizer has none."""
    if not isinstance(token_id, int) or not isinstance(text, str):
        return None, None
    return token_id, text


def ragged_arange(
    starts: Int64[np.ndarray, " n"], counts: Int64[np.ndarray, " n"]
) -> Int64[np.ndarray, " total"]:
    """starts[i], ..., starts[i] + counts[i] - 1 for each i, end to end."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())
