"""A training set that is streamed: what is checked first, and what as it passes."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from engine.config.dpo import DPOConfig
from engine.config.streaming import check_streaming
from engine.data.pair_streams import PairStream
from engine.data.pair_tokens import Limits, PairTokens
from engine.data.row_streams import Chunk, stream_rows
from engine.errors import InputError

logger = logging.getLogger(__name__)


def prepare_stream(
    config: DPOConfig, data: Any, tokenizer: PreTrainedTokenizerBase
) -> PairStream:
    """The pairs of a stream of rows, of which none is read yet.

    Args:
        data: what `is_stream` holds for.
    Raises:
        InputError: options that need the whole data set.
    """
    rows = stream_rows(data)
    check_streaming(config, rows.shuffle_buffer_size)
    return PairStream(
        rows=rows,
        tokenizer=tokenizer,
        limits=Limits(
            max_prompt_length=config.max_prompt_length,
            max_completion_length=config.max_completion_length,
            max_length=config.max_length,
            truncation_mode=config.truncation_mode,
        ),
        score=config.score,
        tools=config.tools,
    )


def checked(stream: PairStream, vocab_size: int, positions: int) -> PairStream:
    """The stream, each of whose pairs is checked before it is used; the first now.

    Args:
        vocab_size: the model's.
        positions: the model's `max_position_embeddings`.
    Raises:
        InputError: one of the first rows is no pair for this model.
    """
    check = _check(stream.tokenizer, vocab_size, positions)
    stream = replace(stream, check=check)
    assert stream.head is not None
    return stream


def check_no_values(evaluations: Mapping[str, PairTokens]) -> None:
    """Refuse the reference's log-probabilities in data beside a stream, as it has none.

    Raises:
        InputError: naming the data set.
    """
    for name, pairs in evaluations.items():
        if pairs.ref_logps is not None:
            raise InputError(
                f"the columns ref_chosen_logps and ref_rejected_logps of {name} have "
                "no effect beside a training set that is streamed; remove them"
            )


def unknown_id(
    tokenizer: PreTrainedTokenizerBase, token: int, vocab_size: int, where: str
) -> InputError:
    """The error of a token that the model has no embedding for."""
    return InputError(
        f"the model's vocab_size={vocab_size} has no token {token} "
        f"({tokenizer.convert_ids_to_tokens(token)!r}), which is in {where}; use the "
        "model's own tokenizer"
    )


def _check(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, positions: int
) -> Callable[[PairTokens, Chunk], None]:
    told = False

    def check(pairs: PairTokens, chunk: Chunk) -> None:
        nonlocal told
        if not len(pairs):
            return
        place = int(pairs.tokens.argmax())
        largest = int(pairs.tokens[place])
        if largest >= vocab_size:
            pair = (int(pairs.offsets.searchsorted(place, side="right")) - 1) // 2
            where = chunk.where(int(pairs.rows[pair]))
            raise unknown_id(tokenizer, largest, vocab_size, where)
        longest = pairs.lengths.reshape(-1, 2).max(axis=1)
        if not told and longest.max() > positions:
            told = True
            row = int(pairs.rows[int((longest > positions).argmax())])
            logger.warning(
                "%s, has %d tokens, more than the %d positions of the model "
                "(max_position_embeddings), and others may too; lower max_length",
                chunk.where(row),
                longest.max(initial=0, where=pairs.rows == row),
                positions,
            )

    return check
