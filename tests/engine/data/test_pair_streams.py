"""Pairs of a stream: tokenised as when held, drawn from a buffer, in known shapes."""

import itertools
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from datasets import IterableDataset

from engine.config.dpo import DPOConfig
from engine.data.batches import BatchPlan, Order
from engine.data.layouts import Layout
from engine.data.pair_streams import Pair, PairStream, joined
from engine.data.pair_tokens import Limits, PairTokens
from engine.data.pairs import tokenize_pairs
from engine.data.row_streams import CHUNK, stream_rows
from engine.data.shapes import stream_shapes
from engine.data.stream_plans import StreamPlan
from engine.errors import InputError
from engine.parallel.sharding import make_mesh
from engine.training.plans import plan_stream
from engine.training.streams import check_no_values, checked, prepare_stream
from tests.engine.tiny_tokenizers import make

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LIMITS = Limits(None, None, 40, "keep_start")


def rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of different lengths, the prompt of each with its number."""
    rng = np.random.default_rng(seed)

    def words(most: int) -> str:
        return "".join(rng.choice(list(LETTERS), rng.integers(1, most)))

    return [
        {"prompt": f"{i}:{words(9)}", "chosen": words(25), "rejected": words(12)}
        for i in range(number)
    ]


def stream_of(data: list[dict], buffer: int = 1, limits: Limits = LIMITS, read=None):
    """A stream that counts in `read` the rows that were taken."""

    def generate() -> Iterator[dict[str, Any]]:
        for row in data:
            if read is not None:
                read.append(row)
            yield row

    taken = IterableDataset.from_generator(generate)
    return PairStream(rows=stream_rows(taken, buffer), tokenizer=make(), limits=limits)


def plan_of(stream: PairStream, steps: int, size: int = 4, **options) -> StreamPlan:
    defaults: dict[str, Any] = {"shuffle": False, "seed": 0, "grid": (1, 1, size)}
    return StreamPlan(stream, steps=steps, **defaults | options)


def same(one: PairTokens, other: PairTokens):
    for name in ("tokens", "scored", "offsets", "completion_start", "rows", "weights"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def numbers(pairs: Iterator[Pair]) -> list[int]:
    return [pair.row for pair in pairs]


def test_pairs_are_those_of_the_data_set_that_is_held(tmp_path):
    data = rows(2 * CHUNK + 5)
    data[3] |= {"rejected": ["one", "two"], "weight": 2.5}
    held = tokenize_pairs(data, make(), max_length=40, cache_dir=tmp_path)
    same(joined(list(stream_of(data).pairs(0))), held)


@pytest.mark.parametrize("buffer", [0, 1, 7, 1000])
def test_pairs_are_drawn_from_a_buffer(buffer):
    stream = stream_of(rows(300), buffer)
    order = numbers(stream.drawn(0, seed=3))
    assert order == numbers(stream.drawn(0, seed=3))
    assert sorted(order) == list(range(300))
    size = max(1, buffer)
    # Pair i comes into the buffer only when i - size + 1 pairs have left it.
    assert all(place >= number - size + 1 for place, number in enumerate(order))
    if size == 1:
        assert order == list(range(300))
        return
    assert order != list(range(300))
    assert order != numbers(stream.drawn(1, seed=3))
    assert order != numbers(stream.drawn(0, seed=4))
    if size > 300:  # each pair may come anywhere
        first = [next(stream.drawn(n, seed=0)).row for n in range(9)]
        assert max(first) > 150 and len(set(first)) > 6


def test_little_more_is_read_than_the_buffer_holds():
    read: list[dict] = []
    pairs = stream_of(rows(4000), 500, read=read).drawn(0, seed=0)
    taken = list(itertools.islice(pairs, 20))
    pairs.close()
    # A chunk is in use, two are tokenised ahead, and a library may be one row ahead.
    assert len(taken) == 20 and 520 <= len(read) <= 520 + 4 * CHUNK + 1
    before = len(read)
    assert not any(pair is None for pair in taken) and len(read) == before


def test_a_pair_keeps_no_other_in_memory():
    for pair in itertools.islice(stream_of(rows(20)).pairs(0), 5):
        assert pair.tokens.base is None and pair.scored.base is None


def test_drops_and_doubts_are_said_once_and_counted(caplog):
    data = rows(300)
    for i in (5, 6, 200):
        data[i] |= {"prompt": "p" * 50}  # nothing of the answers is left
    for i in (7, 130, 131):
        data[i] |= {"rejected": data[i]["chosen"]}
    data[8] |= {"weight": 0}
    stream = stream_of(data)
    with caplog.at_level(logging.INFO, "engine.data"):
        assert len(list(stream.pairs(0))) == 296
        said = [record.getMessage() for record in caplog.records]
        caplog.clear()
        assert len(list(stream.pairs(1))) == 296
    assert not caplog.records
    row = "the data set, row {} (counting from 0)"
    starts = [
        f"a pair of {row.format(5)} is dropped (others like it are counted): max_len",
        f"a pair of {row.format(8)} is dropped (others like it are counted): their w",
        f"1 of the first 128 rows (the first: {row.format(7)}) have the same tokens",
        "the data set: 300 rows read in all, 296 pairs, 3 dropped (cut away), 1 drop"
        "ped (weight 0), 3 rows in doubt (equal sides)",
    ]
    for start, found in zip(starts, said, strict=True):
        assert found.startswith(start)


def test_no_pair_at_all_is_an_error():
    stream = stream_of([row | {"prompt": "p" * 50} for row in rows(3)])
    with pytest.raises(InputError, match="^none of the 3 pairs has a token to score: "):
        list(stream.pairs(0))
    plan = plan_of(stream_of(rows(3)), 1, drop_last=True)
    with pytest.raises(InputError, match="its pairs do not fill one batch of 4, and "):
        next(plan.batches())


def test_a_bad_row_is_named_when_it_is_met():
    data = rows(400)
    data[300] = {"prompt": "p", "chosen": "c", "rejected": 7}
    plan = plan_of(stream_of(data), 100)
    batches = plan.batches()
    assert len(list(itertools.islice(batches, 60))) == 60
    with pytest.raises(InputError, match=r"^the data set, row 300 \(counting from 0\)"):
        list(batches)


def test_columns_of_the_reference_are_refused():
    stream = stream_of([row | {"ref_chosen_logps": -1.0} for row in rows(3)])
    with pytest.raises(InputError, match="row 0 .*, has the column ref_chosen_logps, "):
        list(stream.pairs(0))
    held = replace(
        joined(list(stream_of(rows(3)).pairs(0))),
        ref_logps=np.zeros((3, 2), np.float32),
    )
    with pytest.raises(InputError, match="of eval_dataset have no effect beside a tr"):
        check_no_values({"eval_dataset": held})


# ------------------------------------------------------------------ checks by the model


def test_tokens_and_positions_are_checked_as_rows_pass(caplog):
    data = rows(300)
    data[200] |= {"chosen": "abc~"}  # id 136
    data[150] |= {"chosen": "a" * 30}
    stream = checked(stream_of(data), 136, 30)  # the first rows are sound
    with caplog.at_level(logging.WARNING, "engine"):
        with pytest.raises(InputError) as caught:
            list(stream.pairs(0))
    assert str(caught.value) == (
        "the model's vocab_size=136 has no token 136 ('~'), which is in the data set, "
        "row 200 (counting from 0); use the model's own tokenizer"
    )
    data[0] |= {"chosen": "a" * 35}
    data[200] |= {"chosen": "abc"}
    caplog.clear()
    stream = checked(stream_of(data), 136, 30)
    assert len(list(stream.pairs(0))) == 300
    (record,) = caplog.records
    found = record.getMessage()
    assert found.startswith(
        "the data set, row 0 (counting from 0), has 40 tokens, more"
    )
    data[1] |= {"chosen": "~"}
    with pytest.raises(InputError, match="which is in the data set, row 1"):
        checked(stream_of(data), 136, 30)


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "^max_training_steps is missing: how long a data set is"),
        (
            {"max_training_steps": 3, "num_train_epochs": 1},
            "^num_train_epochs=1 has no effect on a data set that is streamed",
        ),
        (
            {"max_training_steps": 3, "precompute_ref_log_probs": True},
            "^precompute_ref_log_probs=True cannot be with a data set that is streamed",
        ),
        (
            {"max_training_steps": 3, "shuffle_train_dataset": False},
            "^shuffle_buffer_size=9 has no effect with shuffle_train_dataset=False",
        ),
    ],
)
def test_options_that_a_stream_makes_impossible(options, message):
    data = stream_of(rows(3), 9).rows
    with pytest.raises(InputError, match=message):
        prepare_stream(DPOConfig(**options), data, make())


def test_batches_must_be_split_evenly():
    config = DPOConfig(max_training_steps=3, total_batch_size=6)
    stream = prepare_stream(config, stream_of(rows(3), 9).rows, make())
    with pytest.raises(InputError, match="^total_batch_size=6 pairs cannot be sp"):
        plan_stream(config, stream, make_mesh(2, 2, 1, devices=jax.devices()[:4]))


# ------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    "limits, lengths",
    [
        ((None, None, 512), [64, 128, 256, 512]),
        ((None, None, 100), [56, 104]),
        ((None, None, 2), [8]),
        ((40, 30, 512), [40, 72]),
        ((None, 30, 500), [64, 128, 256, 504]),
    ],
)
def test_shapes_of_a_stream(limits, lengths):
    prompt, completion, longest = limits
    shapes = stream_shapes(Limits(prompt, completion, longest, "keep_start"), 3)
    assert [s for s, _ in shapes] == lengths
    for length, capacity in shapes:
        most = 6 * min(length - 1, completion or length)
        assert most <= capacity < most + 128 and capacity % 128 == 0


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_every_batch_fits_whatever_the_rows_are(mode):
    rng = np.random.default_rng(0)
    for _ in range(8):
        prompt, completion = (
            None if rng.random() < 0.3 else int(rng.integers(1, 20)) for _ in range(2)
        )
        limits = Limits(prompt, completion, int(rng.integers(15, 60)), mode)
        data = rows(40, seed=int(rng.integers(100)))
        for row in data[::2]:  # as many tokens as the limits leave
            row |= {"chosen": 60 * "c", "rejected": 60 * "r"}
        stream = stream_of(data, 10, limits)
        plan = plan_of(stream, 15, grid=(2, 2, 1), shuffle=True)
        for batch, tokens in plan.batches():
            assert batch.shape in plan.shapes
            assert tokens == (batch.rows.tokens > 0).sum()


@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_of_passes_are_those_of_epochs(tmp_path, drop_last):
    """Without shuffling: padded otherwise, and the same else."""
    data, size = rows(22), 4
    held = tokenize_pairs(data, make(), max_length=40, cache_dir=tmp_path)
    order = Order(num_pairs=22, pairs_per_batch=size, drop_last=drop_last)
    expected = BatchPlan(order, Layout(held, size, 2, 1), steps=14)
    plan = plan_of(stream_of(data), 14, grid=(2, 1, 2), drop_last=drop_last)
    assert plan.grid == expected.grid
    found = list(plan.batches())
    assert len(found) == 14
    for step, (batch, tokens) in enumerate(found):
        epoch, index = divmod(step, order.batches_per_epoch)
        wanted = expected.layout.build(order.epoch(epoch)[index], (batch.shape,))
        for got, want in zip(
            jax.tree.leaves((batch, tokens)), jax.tree.leaves(wanted), strict=True
        ):
            np.testing.assert_array_equal(got, want)
    per_epoch = order.batches_per_epoch
    epochs = [plan.epochs_done(step, 2) for step in range(1, 15)]
    whole = [step / per_epoch for step in range(1, 15)]
    assert epochs == [0.0 if x < 1 else pytest.approx(x) for x in whole]


def test_a_run_goes_on_where_it_was():
    options = {"shuffle": True, "seed": 7}
    whole = list(plan_of(stream_of(rows(50), 9), 30, **options).batches())
    plan = plan_of(stream_of(rows(50), 9), 30, **options)
    rest = list(plan.batches(17))
    assert len(whole) == 30 and len(rest) == 13
    leaves = jax.tree.leaves(whole[17:]), jax.tree.leaves(rest)
    for one, other in zip(*leaves, strict=True):
        np.testing.assert_array_equal(one, other)
    assert plan.epochs_done(13, 4) == 1  # 50 pairs are 13 batches, the last of 2
    other = plan_of(stream_of(rows(50), 9), 30, shuffle=True, seed=8)
    first, _ = next(other.batches())
    assert not np.array_equal(first.rows.tokens, whole[0][0].rows.tokens)


def test_a_closed_run_of_batches_leaves_no_thread():
    before = threading.active_count()
    batches: Any = plan_of(stream_of(rows(2000), 50), 400).batches()
    next(batches)
    assert threading.active_count() > before
    batches.close()
    assert threading.active_count() == before
