"""The run's form of its first batch is compared with plain rows."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset
from jax import lax

from engine import LoraConfig
from engine.data import assembly, layouts
from engine.data.pair_streams import PairStream
from engine.errors import InputError
from engine.models.attention import tiles
from engine.objective import scoring
from engine.parallel.batch import KeySpans
from engine.parallel.row_parts import RowParts
from engine.parallel.sharding import SEQUENCE
from engine.training import form_check, plain_form
from engine.training.form_check import Difference, check_form
from tests.engine.training.runs import ROWS, make_trainer

ONE, TWO, SPREAD, FOUR = (1, 1, 1), (1, 2, 1), (1, 1, 1, 2), (1, 2, 2)
PACKED, SHARED = {"packing": True}, {"share_prompt": True}
BOTH: dict[str, Any] = PACKED | SHARED
BF16 = {"dtype": "bfloat16"}


def checked(directory, sizes=ONE, **options):
    given: dict[str, Any] = {"evaluate": False, "train_dataset": ROWS} | options
    trainer = make_trainer(directory, sizes=sizes, **given)
    check_form(trainer.run, trainer.model)
    return trainer


@pytest.fixture
def said(caplog):
    """The lines of the check."""
    caplog.set_level(logging.INFO, logger="engine")
    return lambda: [x for x in caplog.messages if x.startswith("start check")]


@pytest.mark.parametrize(
    ("sizes", "options", "words"),
    [
        (ONE, PACKED, "packed rows give what a row for each sequence does here (4 p"),
        (ONE, SHARED | BF16, "shared beginnings give"),
        (ONE, BOTH, "packed rows with shared beginnings give"),
        (SPREAD, BOTH | BF16, "sequence=2, tensor=1 give"),
        (FOUR, BF16, "rows on data=1, fsdp=2, tensor=2 give"),
        ((2, 1, 1), PACKED | {"gradient_accumulation_steps": 2}, "does on one device"),
        (FOUR, PACKED | {"lora": LoraConfig(r=2)}, "does on one device (4 pairs"),
        (ONE, BOTH | {"ld_alpha": 0.3}, "give what"),
        (ONE, SHARED | {"precompute_ref_log_probs": True}, "shared beginnings give"),
    ],
    ids=str,
)
def test_a_form_that_is_right_passes(sizes, options, words, tmp_path, said):
    checked(tmp_path, sizes, **options)
    (line,) = said()
    assert words in line, line
    assert float(line.split("off by ")[1].split()[0]) < 0.3


def test_of_a_stream_the_rows_that_have_been_read_are_compared(
    tmp_path, said, monkeypatch
):
    """They are fewer than a batch has; and where none is a pair, there is no check."""
    stream = Dataset.from_list(ROWS[:3]).to_iterable_dataset()
    options: dict[str, Any] = {"train_dataset": stream, "max_training_steps": 1}
    trainer = checked(tmp_path, **BOTH, **options)
    assert "beginnings give what a row for each sequence does here (3 p" in said()[0]
    monkeypatch.setattr(PairStream, "head", property(lambda stream: (None, [])))
    check_form(trainer.run, trainer.model)
    assert said()[1:] == ["start check: a stream's first rows have no pair to compare"]


def test_plain_rows_on_one_device_are_not_compared(tmp_path, said):
    checked(tmp_path)
    assert not said()


@pytest.mark.parametrize("sizes", [SPREAD, (1, 2, 1, 2), FOUR], ids=str)
def test_a_model_that_one_device_has_no_room_for(sizes, tmp_path, said, monkeypatch):
    monkeypatch.setattr(plain_form, "_COPY", 0.0)
    checked(tmp_path, sizes)
    (line,) = said()
    if len(sizes) == 3:  # the form is as plain as it can be there
        assert "is not compared with one device, which has no room" in line
    else:
        assert "does on the same devices (4 pairs" in line


def without_the_mask(patch):
    attend = tiles.attend
    patch.setattr(
        tiles, "attend", lambda *x, **given: attend(*x, **given | {"spans": None})
    )


def without_own_positions(patch):
    """A second branch goes on from the first one's end."""

    def index(spans):
        numbers = jnp.arange(spans.first.shape[-1], dtype=jnp.int32)
        return jnp.broadcast_to(numbers[None], spans.first.shape)

    patch.setattr(KeySpans, "positions", property(index))


def with_a_gap(patch):
    """Of one position between what is shared and what is not."""
    positions = vars(KeySpans)["positions"].fget

    def later(spans):
        own = jnp.asarray(spans.begin != spans.first)
        return positions(spans) + own.astype(jnp.int32)

    patch.setattr(KeySpans, "positions", property(later))


def without_the_last_shared_token(patch):
    spans_of = assembly._spans

    def fewer(*given):
        spans = spans_of(*given)
        shared_end = np.maximum(spans.first, spans.shared_end - 1)
        return spans._replace(shared_end=shared_end)

    patch.setattr(assembly, "_spans", fewer)


def with_parts_in_another_order(patch):
    def gather(parts, x):
        if parts.devices == 1:
            return x
        return lax.all_gather(x, SEQUENCE, axis=1, tiled=True)

    patch.setattr(RowParts, "gather", gather)


def with_rolled(name):
    """The batch's targets, or counts of sequences, one place further on."""

    def change(patch):
        assemble = assembly.assemble

        def rolled(*given):
            batch, number = assemble(*given)
            array = np.roll(getattr(batch.scored, name), 1, axis=2)
            scored = batch.scored._replace(**{name: array})
            return batch._replace(scored=scored), number

        patch.setattr(layouts, "assemble", rolled)

    return change


def with_pairs_of_several_devices_mixed(patch):
    patch.setattr(scoring, "by_pair", lambda values: tuple(values.reshape(2, -1)))


@pytest.mark.parametrize(
    ("fault", "sizes", "options", "what"),
    [
        (without_the_mask, ONE, PACKED, "packed rows change"),
        (without_the_mask, ONE, SHARED | BF16, "shared beginnings change"),
        (without_own_positions, ONE, SHARED | BF16, "shared beginnings change"),
        (with_a_gap, ONE, BOTH | BF16, "packed rows with shared beginnings change"),
        (without_the_last_shared_token, ONE, SHARED | BF16, "shared beginnings ch"),
        (
            with_parts_in_another_order,
            SPREAD,
            BF16,
            "the devices .*sequence=2, tensor=1. ch",
        ),
        (with_rolled("targets"), ONE, PACKED | BF16, "packed rows change"),
        (with_rolled("counts"), ONE, PACKED | BF16, "packed rows change"),
        # Rows and devices: it says which of them.
        (without_the_mask, TWO, PACKED | BF16, "packed rows change"),
        (with_pairs_of_several_devices_mixed, TWO, PACKED, "the devices .data=1, fsd"),
    ],
)
def test_a_fault_is_found(fault, sizes, options, what, tmp_path, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(InputError, match=f"^{what}.* more than rounding does: the log"):
        checked(tmp_path, sizes, **options)


def test_rope_does_not_know_where_a_sequence_begins(tmp_path, monkeypatch, said):
    """It turns by differences of positions: those of packed sequences may go on."""
    without_own_positions(monkeypatch)
    checked(tmp_path, **PACKED)
    assert "packed rows give" in said()[0]


def difference(found, plain=-20.0, explained=0.1) -> Difference:
    both = [np.full((1, 2), x) for x in (found, plain, explained)]
    return Difference(found=both[0], plain=both[1], explained=both[2])


def test_parts_of_what_rounding_explains():
    assert difference(-20.05).parts == pytest.approx(0.5)
    assert difference(-19.8).parts == pytest.approx(2.0)
    assert (difference(np.nan).parts == np.inf).all()


EPS, EPS_BF16 = 2.0**-23, 2.0**-7


@pytest.mark.parametrize(
    ("dtype", "off", "want"),
    [
        # Four tokens of 5 nats each: 24 or 20 + 4 roundings of the sum, in float32.
        ("float32", 0.0, 2 * 6 * 2.0**-18),
        ("bfloat16", 0.0, 2 * 6 * EPS_BF16 / 2),
        ("bfloat16", 3.0, 3.0),  # plain JAX's own error is what counts
    ],
)
def test_what_rounding_explains(dtype, off, want):
    plain = np.full((2, 2), -20.0, np.float32)
    tokens = np.full((2, 2), 4)
    found = form_check._explained(plain, plain + np.float32(off), tokens, dtype)
    np.testing.assert_allclose(found, 8 * (want + 24 * EPS), rtol=1e-5)
    # That of one token is half of that of four.
    one = form_check._explained(plain / 4, plain / 4 + off / 2, tokens // 4, dtype)
    np.testing.assert_allclose(one, 8 * (want / 2 + 6 * EPS), rtol=1e-5)


def test_what_is_to_be_exact_is_so_on_any_device():
    class Step:
        def lower(self, *arguments):
            return arguments, jax.config.jax_default_matmul_precision

    assert form_check._Precise(Step(), "high").lower(1, 2) == ((1, 2), "high")


def test_a_model_that_is_not_finite_is_the_steps_to_refuse(tmp_path, monkeypatch, said):
    nothing = difference(np.nan, plain=np.nan)
    monkeypatch.setattr(form_check, "compare", lambda *given: nothing)
    checked(tmp_path, **PACKED)
    assert not said()


def test_a_run_is_checked_once_and_stays_as_it_is(tmp_path, monkeypatch, said):
    """Also where the plain form has no copy of the model, whose arrays are given up."""
    options: dict[str, Any] = {"max_training_steps": 2, "save_steps": 1} | PACKED
    options |= {"evaluate": False, "sizes": (2, 1, 1), "lr_scheduler_type": "constant"}
    trainer = make_trainer(tmp_path / "checked", **options)
    got = trainer.train()
    assert sum("packed rows on" in x for x in said()) == 1
    without = make_trainer(tmp_path / "not", **options, start_check=False)
    want = without.train()
    assert len(said()) == 2  # the other one is of the first step's metrics
    assert got["loss"] == want["loss"] and got["grad_norm"] == want["grad_norm"]
    for a, b in zip(*map(jax.tree.leaves, (trainer.state, without.state)), strict=True):
        np.testing.assert_array_equal(a, b)

    # What goes on comes to its programs without it.
    def compiling(*given, **options):
        raise RuntimeError("compiles")

    options["max_training_steps"] = 3
    again = make_trainer(tmp_path / "checked", **options, start_check=True)
    monkeypatch.setattr(form_check, "compare", None)
    monkeypatch.setattr(again._programs, "compile", compiling)
    with pytest.raises(RuntimeError, match="compiles"):
        again.train()


def test_a_fault_ends_a_run_before_it_begins(tmp_path, monkeypatch):
    without_the_mask(monkeypatch)
    trainer = make_trainer(tmp_path, evaluate=False, packing=True)
    with pytest.raises(InputError, match="row .* of its own here, of which rounding"):
        trainer.train()
    assert not (tmp_path / "model.safetensors").exists()
    assert not trainer.progress.step
