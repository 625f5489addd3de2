"""Token ids as text: whole characters, no matter how a vocabulary writes bytes."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from engine.inspection.pieces import Piece, Pieces
from tests.engine.tiny_tokenizers import EOS, ids, make

BYTES = Path(__file__).parents[2] / "fixtures" / "trl_tokens" / "bytes"


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(BYTES)


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: bytes where the vocabulary has no character."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocab |= {"<unk>": 256, "▁": 257, "▁Hi": 258, "H": 259}
    model = Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence(steps)  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def joined(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("text", ["plain words", "é 漢字", "😀😀", "a b", "naïve — ok"])
def test_all_bytes_of_a_text_come_back(byte_level, text):
    tokens = encode(byte_level, text)
    pieces = Pieces(byte_level)(tokens)
    assert joined(pieces) == text
    assert [x for piece in pieces for x in piece.ids] == tokens


def test_a_character_of_several_tokens_is_one_piece(byte_level):
    tokens = encode(byte_level, "漢")
    assert len(tokens) == 3
    assert Pieces(byte_level)(tokens) == [Piece("漢", tuple(tokens))]
    # Where a boundary goes through it, each part shows its bytes.
    assert [p.text for p in Pieces(byte_level)(tokens[:2])] == ["\\xe6", "\\xbc"]
    assert [p.text for p in Pieces(byte_level)(tokens[2:])] == ["\\xa2"]


def test_bytes_that_are_no_character_hide_nothing_after_them(byte_level):
    tokens = encode(byte_level, "漢")[:2] + encode(byte_level, "x漢")
    found = [piece.text for piece in Pieces(byte_level)(tokens)]
    assert found == ["\\xe6", "\\xbc", "x", "漢"]


def test_sentencepiece(sentencepiece):
    tokens = [258, 257, 0xE6, 0xBC, 0xA2, 0x0A, 259]
    assert Pieces(sentencepiece)(tokens) == [
        Piece(" Hi", (258,)),
        Piece(" ", (257,)),
        Piece("漢", (0xE6, 0xBC, 0xA2)),
        Piece("\\n", (0x0A,), ends_line=True),
        Piece("H", (259,)),
    ]


def test_special_tokens():
    tokenizer = make()
    tokenizer.add_tokens([AddedToken("<turn>", special=True), AddedToken("~~")])
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    pieces = Pieces(tokenizer)([EOS, added["<turn>"], added["~~"], *ids("a")])
    assert [(p.text, p.special) for p in pieces] == [
        ("</s>", True),
        ("<turn>", True),
        ("~~", False),
        ("a", False),
    ]


def test_an_id_that_the_tokenizer_does_not_have():
    assert Pieces(make())([99999])[0].text == "<99999?>"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a b", "a b"),
        ("\t\r\n", "\\t\\r\\n"),
        ("\\n", "\\\\n"),  # a backslash and an n are no line break
        ("\x1b[31m", "\\x1b[31m"),
        ("a\N{ZERO WIDTH SPACE}b", "a\\u200bb"),
        ("\N{RIGHT-TO-LEFT OVERRIDE}", "\\u202e"),
        ("\N{NO-BREAK SPACE}", "\\xa0"),
        ("\N{LINE SEPARATOR}", "\\u2028"),
        ("é😀", "é😀"),
    ],
)
def test_what_cannot_be_seen_is_escaped(text, shown):
    assert Pieces(make()).visible(text) == shown


def test_what_the_output_cannot_show_is_escaped():
    assert Pieces(make(), "ascii").visible("é😀a") == "\\xe9\\U0001f600a"
