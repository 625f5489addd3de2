"""Tokenizers from checkpoint directories."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine.errors import stage
from engine.models.weights import resolve_directory


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id.

    Raises:
        InputError: none is there, or it cannot be read.
    """
    directory = resolve_directory(name_or_path)
    with stage(
        f"{directory}: the tokenizer cannot be loaded",
        "put its files there, or name another one with model.tokenizer",
    ):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
