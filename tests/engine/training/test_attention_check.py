"""The device's attention is compared with plain JAX before the first step."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from engine import DPOConfig
from engine.errors import InputError
from engine.models import attention
from engine.models.attention import splash
from engine.parallel.batch import PADDED, Arrangement
from engine.training import attention_check
from engine.training.attention_check import check_attention, compare
from tests.engine.tiny_models import mesh_of, tiny_config

PACKED = Arrangement(packing=True)
SHARED = Arrangement(share_prompt=True)
BOTH = Arrangement(packing=True, share_prompt=True)
DEVICE = jax.devices()[0]


HEADS = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 64, "query_scale": 0.125}
LLAMA = replace(tiny_config("llama"), **HEADS)
GEMMA = replace(tiny_config("gemma2"), **HEADS, attn_softcap=3.0, sliding_window=4096)


@pytest.fixture
def kernel(monkeypatch):
    """The kernels of a TPU, interpreted; or what a test makes of them."""

    def replace(change):
        interpreted = functools.partial(splash_attend, interpret=True)
        monkeypatch.setattr(splash, "attend", change(interpreted))

    splash_attend = splash.attend
    replace(lambda attend: attend)
    return replace


@pytest.mark.parametrize("arrangement", [PADDED, PACKED, SHARED, BOTH])
def test_a_kernel_that_is_right_passes(arrangement, kernel):
    given = GEMMA if arrangement is BOTH else LLAMA
    assert 0 < compare("splash", given, arrangement, jnp.bfloat16, DEVICE) < 0.5


def without(name):
    """A kernel that takes no notice of an option."""

    def change(attend):
        return lambda *args, **given: attend(*args, **given | {name: None})

    return change


def with_a_wrong_gradient(attend):
    def wrong(query, key, value, **given):
        # The value is right, and all of its gradient but that of the keys.
        return attend(query, key * 2 - jax.lax.stop_gradient(key), value, **given)

    return wrong


@pytest.mark.parametrize(
    ("change", "arrangement", "what"),
    [
        (without("spans"), PACKED, "its values in packed rows, window"),
        (
            without("spans"),
            SHARED,
            "its values in unpacked rows with shared",
        ),
        (without("window"), PADDED, "its values in unpacked rows, window 4096"),
        (
            without("softcap"),
            PADDED,
            "its values in unpacked rows, window",
        ),
        (with_a_wrong_gradient, PACKED, "d key in packed rows, window"),
    ],
)
def test_one_that_is_not_is_refused(change, arrangement, what, kernel):
    kernel(change)
    with pytest.raises(InputError, match=f"attention='splash' is not .*: {what}"):
        compare("splash", GEMMA, arrangement, jnp.bfloat16, DEVICE)


def test_a_run_asks_for_its_own(monkeypatch, caplog):
    asked = []

    def comparing(*given):
        asked.append(given)
        return 0.25

    monkeypatch.setattr(attention_check, "compare", comparing)
    mesh, config = mesh_of((1, 1, 1)), LLAMA
    check_attention(config, DPOConfig(packing=True), "bfloat16", mesh)
    assert not asked  # plain JAX
    monkeypatch.setattr(attention, "choose", lambda asked, case: "tokamax")
    with caplog.at_level("INFO", logger="engine"):
        check_attention(config, DPOConfig(packing=True), "bfloat16", mesh)
    arrangement = DPOConfig(packing=True).arrangement
    assert asked == [("tokamax", config, arrangement, "bfloat16", DEVICE)]
    assert (
        "by tokamax gives on this device what plain JAX does (off by 0.25"
        in caplog.text
    )
