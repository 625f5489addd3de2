"""Rows of several sequences give what a row for each gives, to rounding."""

import pytest

from dpo_kernels import spread
from engine.models import embed
from tests.engine.training.step_runs import assert_same, prompted_pairs, run

PAIRS = prompted_pairs(48)
PACKED, SHARED = {"packing": True}, {"share_prompt": True}


@pytest.fixture(scope="module")
def padded():
    return run((1, 1, 1), pairs=PAIRS)


@pytest.mark.parametrize(
    "sizes, options",
    [
        ((1, 1, 1), PACKED | SHARED),
        ((1, 1, 1), SHARED | {"gradient_accumulation_steps": 4}),
        ((2, 2, 2), PACKED | {"gradient_accumulation_steps": 2}),
        ((1, 2, 4), PACKED | SHARED | {"offload_ref_model": True}),
        # Rows over four and two devices, the last of data, fsdp, tensor and
        # sequence; padded ones are in test_gradients.py.
        ((1, 2, 1, 4), PACKED | SHARED),
        ((2, 1, 2, 2), SHARED | {"gradient_accumulation_steps": 2}),
    ],
    ids=str,
)
def test_steps_agree(sizes, options, padded):
    assert_same(run(sizes, pairs=PAIRS, **options), padded)


@pytest.mark.parametrize(
    "sizes, options",
    [((2, 2, 2), SHARED), ((1, 2, 1, 4), PACKED | SHARED)],
    ids=str,
)
def test_steps_in_small_blocks_agree(sizes, options, padded, monkeypatch):
    """The MLP's tokens, those that are looked up, and those that are scored."""
    monkeypatch.setattr(embed, "_BLOCK_BYTES", 2**15)
    monkeypatch.setattr(spread, "_LEAST_ROWS", 64)
    got = run(sizes, pairs=PAIRS, model_options={"mlp_tile": 24}, **options)
    assert_same(got, padded)


def test_padding_pairs_weigh_nothing():
    pairs = prompted_pairs(3)  # in sixteen places
    want = run((1, 1, 1), pairs=pairs)
    assert_same(run((1, 1, 1), pairs=pairs, **PACKED, **SHARED), want)
