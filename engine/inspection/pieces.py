"""Token ids as text that can be shown: whole characters, and nothing hidden.

A token may be part of a character. Tokens that are whole characters only together make
one piece, unless a boundary goes through it: then each is shown by its bytes.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # one, in a vocabulary of SentencePiece
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for one, there
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}
# Control, format (invisible joiners, the direction of writing), private and unassigned
# characters, separators of lines, and spaces that look like the usual one.
_HIDDEN = frozenset(("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"))


class Piece(NamedTuple):
    """Tokens that follow each other, and what they say."""

    text: str  # with escapes for all that cannot be seen
    ids: tuple[int, ...]
    special: bool = False
    ends_line: bool = False


class Pieces:
    """Makes pieces of a tokenizer's ids.

    Args:
        encoding: what the text is for; characters that it lacks are escaped.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoding: str = "utf-8"):
        self._tokenizer = tokenizer
        self._encoding = encoding
        added = tokenizer.added_tokens_decoder
        self._added = {index: token.content for index, token in added.items()}
        self._special = frozenset(
            (*tokenizer.all_special_ids, *(i for i, x in added.items() if x.special))
        )
        self._bytes = _reading(tokenizer)

    def __call__(self, ids: Sequence[int]) -> list[Piece]:
        """All ids, in order, in pieces of as few tokens as are whole characters."""
        result: list[Piece] = []
        waiting: list[int] = []
        held = b""
        for index in ids:
            waiting.append(index)
            held += self._of(index)
            try:
                text = held.decode()
            except UnicodeDecodeError as error:
                if error.end == len(held) and error.reason.startswith("unexpected end"):
                    continue
                result += map(self._alone, waiting)
            else:
                special = index in self._special and len(waiting) == 1
                result.append(self._piece(text, tuple(waiting), special))
            waiting, held = [], b""
        return result + list(map(self._alone, waiting))

    def _of(self, index: int) -> bytes:
        if index in self._added:
            return self._added[index].encode()
        token = self._tokenizer.convert_ids_to_tokens(index)
        if not isinstance(token, str):
            return f"<{index}?>".encode()
        return self._bytes(token)

    def _alone(self, index: int) -> Piece:
        """A token by itself, its parts of characters as bytes: `\\xe6`."""
        text, held = "", self._of(index)
        ends_line = held.endswith(b"\n")
        while held:
            try:
                text, held = text + self.visible(held.decode()), b""
            except UnicodeDecodeError as error:
                text += self.visible(held[: error.start].decode())
                text += "".join(f"\\x{x:02x}" for x in held[error.start : error.end])
                held = held[error.end :]
        return Piece(text, (index,), index in self._special, ends_line)

    def _piece(self, text: str, ids: tuple[int, ...], special: bool) -> Piece:
        return Piece(self.visible(text), ids, special, text.endswith("\n"))

    def visible(self, text: str) -> str:
        """The text with an escape for each character that cannot be seen."""
        return "".join(map(self._character, text))

    def _character(self, character: str) -> str:
        if character in _NAMED:
            return _NAMED[character]
        if " " <= character <= "~":
            return character
        hidden = unicodedata.category(character) in _HIDDEN
        if not hidden:
            try:
                character.encode(self._encoding)
            except UnicodeEncodeError:
                hidden = True
        return ascii(character)[1:-1] if hidden else character


def _reading(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    """How the vocabulary writes bytes, which the tokenizer's own decoder knows."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    steps = json.loads(decoder.__getstate__()) if decoder is not None else {}
    if "ByteLevel" in _kinds(steps):
        table = _byte_level()
        return lambda token: b"".join(table.get(c, c.encode()) for c in token)
    return _sentencepiece


def _kinds(step: dict[str, Any]) -> set[str]:
    inner = (_kinds(x) for x in step.get("decoders", ()))
    return {str(step.get("type"))}.union(*inner)


def _byte_level() -> dict[str, bytes]:
    """The characters that stand for bytes: those that print are themselves.

    The others, in order, are the characters from 256 on.
    """
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printed)
    table = {chr(byte): bytes([byte]) for byte in printed}
    return table | {chr(256 + i): bytes([byte]) for i, byte in enumerate(others)}


def _sentencepiece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()
