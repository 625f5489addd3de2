"""Which implementation of attention a run has, and why not another."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import Mesh

from engine.errors import InputError
from engine.models import attention
from engine.models.attention import Case, cudnn
from engine.models.attention.unshared import Unshared
from engine.parallel.batch import PADDED, Arrangement, KeySpans
from engine.parallel.sharding import AXES
from tests.engine.tiny_models import mesh_of, tiny_config

PACKED = Arrangement(packing=True)
SHARED = Arrangement(share_prompt=True)
FAULT_OF_TOKAMAX = attention._fault_of_tokamax


@pytest.fixture(autouse=True)
def tokamax_is_installed(monkeypatch):
    monkeypatch.setattr(attention, "_fault_of_tokamax", lambda: None)
    monkeypatch.setattr(cudnn, "fault", lambda: None)


def case(platform="tpu", arrangement=PADDED, **facts: Any):
    if platform == "gpu":
        facts.setdefault("capability", (9, 0))
    return Case(platform=platform, arrangement=arrangement, **facts)


@pytest.mark.parametrize(
    "given, chosen",
    [
        (case("tpu"), "splash"),
        (case("tpu", PACKED), "splash"),
        (case("tpu", dtype="float32"), "splash"),
        (case("tpu", SHARED), "splash"),
        (case("tpu", sequence=2), "splash"),
        (case("tpu", PACKED, sequence=2), "splash"),
        (case("tpu", SHARED, sequence=2), "tiles"),
        (case("gpu"), "tokamax"),
        (case("gpu", PACKED, dtype="float16", capability=(10, 0)), "tokamax"),
        (case("gpu", SHARED), "tokamax"),
        (case("gpu", PACKED, sequence=2), "tokamax"),
        (case("gpu", SHARED, sequence=2), "tiles"),
        (case("gpu", dtype="float32"), "tiles"),
        (case("gpu", capability=(8, 0)), "cudnn"),
        (case("gpu", capability=(12, 0), head_dim=256), "cudnn"),
        (case("gpu", PACKED, capability=(8, 0)), "tiles"),
        (case("gpu", capability=(8, 9), head_dim=256), "tiles"),
        (case("gpu", capability=(8, 0), capped=True), "tiles"),
        (case("gpu", capability=(8, 0), sequence=2), "tiles"),
        (case("gpu", capability=(7, 5)), "tiles"),
        (case("gpu", capability=None), "tiles"),
        (case("rocm"), "tiles"),
        (case("cpu"), "tiles"),
    ],
)
def test_auto_is_the_fastest_that_can_be_had(given, chosen):
    assert attention.choose("auto", given) == chosen
    assert attention.choose("tiles", given) == "tiles"


@pytest.mark.parametrize(
    "name, given, why",
    [
        (
            "splash",
            case("tpu", SHARED, sequence=2),
            "rows with shared beginnings are not spread over devices for it",
        ),
        ("splash", case("cpu"), "for TPUs, and the devices are of platform cpu"),
        (
            "tokamax",
            case("tpu"),
            "for NVIDIA GPUs, and the devices are of .* tpu",
        ),
        ("tokamax", case("gpu", SHARED, sequence=4), "are not spread over devices for"),
        ("tokamax", case("gpu", dtype="float32"), "16 bits (model.dtype=float32); use"),
        (
            "tokamax",
            case("gpu", capability=(8, 6)),
            "and the devices' is 8.6; use auto",
        ),
        ("tokamax", case("gpu", capability=None), "and the devices' is not known"),
        ("cudnn", case("tpu"), "for NVIDIA GPUs, and the devices are of .* tpu"),
        ("cudnn", case("gpu", SHARED), "a row has one sequence for it (packing, "),
        ("cudnn", case("gpu", sequence=2), "are whole rows (sharding.sequence=2); use"),
        ("cudnn", case("gpu", capability=(7, 5)), "8.0, and the devices' is 7.5; use"),
        ("cudnn", case("gpu", dtype="float32"), "16 bits (model.dtype=float32); use"),
        ("cudnn", case("gpu", capped=True), "it caps no scores, as the model's"),
        (
            "cudnn",
            case("gpu", head_dim=257),
            "of 8 up to 256 for it .* model's are 257",
        ),
    ],
)
def test_what_was_asked_for_and_cannot_be_is_refused(name, given, why):
    why = why.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(InputError, match=f"attention='{name}' cannot be: .*{why}"):
        attention.choose(name, given)


def of_a_package(found, monkeypatch):
    """What is said where `find_spec` finds this."""
    monkeypatch.setattr(attention, "find_spec", lambda name: found)
    fault = FAULT_OF_TOKAMAX.__wrapped__
    monkeypatch.setattr(attention, "_fault_of_tokamax", fault)
    assert attention.choose("auto", case("gpu")) == "cudnn"
    assert attention.choose("auto", case("tpu")) == "splash"
    with pytest.raises(InputError) as refused:
        attention.choose("tokamax", case("gpu"))
    return str(refused.value)


def test_a_package_that_is_missing_is_named(monkeypatch):
    said = of_a_package(None, monkeypatch)
    assert "is not installed (pip install tokamax); use auto or tiles" in said


def test_a_package_of_another_form_is_no_traceback(monkeypatch):
    monkeypatch.setitem(sys.modules, "engine.models.attention.hopper", None)
    said = of_a_package("found", monkeypatch)
    assert "the tokamax package that is installed has another form: import of" in said


def test_a_run_says_why_it_has_not_its_devices_own():
    assert attention.describe("auto", case("gpu")).startswith("tokamax: its kernels")
    for given, why in (
        (
            case("gpu", dtype="float32"),
            "not tokamax, as its kernels compute in 16 bits",
        ),
        (
            case("tpu", SHARED, sequence=2),
            "not splash, as rows with shared beginnings are not spread",
        ),
    ):
        words = attention.describe("auto", given)
        assert words.startswith("tiles: plain JAX") and f"; {why}" in words
    for asked, given in (("tiles", case("tpu", sequence=2)), ("auto", case("cpu"))):
        assert "not" not in attention.describe(asked, given)


def test_rows_are_laid_out_for_what_knows_one_run_of_keys():
    spans = KeySpans(*[np.zeros((1, 10), np.int32)] * 3)
    for name in attention.IMPLEMENTATIONS:
        assert attention.laid_out(name, None, SHARED) is None
        assert attention.laid_out(name, spans, PACKED) is spans
    assert attention.laid_out("tiles", spans, SHARED) is spans
    for arrangement, length in (
        (SHARED, 20),
        (Arrangement(share_prompt=True, longest=7), 17),
        (Arrangement(share_prompt=True, longest=70), 20),
        (Arrangement(share_prompt=True, packing=True, longest=7), 20),
    ):
        found = attention.laid_out("splash", spans, arrangement)
        assert isinstance(found, Unshared)
        assert found.source.shape == (1, length)


def test_a_case_is_read_off_the_mesh():
    mesh = mesh_of((1, 2, 1, 2))
    for model in map(tiny_config, ("llama", "gemma2")):
        found = Case.of(mesh, PACKED, "float32", model)
        facts = {"head_dim": model.head_dim, "capped": model.attn_softcap is not None}
        assert found == case("cpu", PACKED, dtype="float32", sequence=2, **facts)


class Gpu:
    """What JAX says of one; its client's name alone tells whose it is."""

    platform = "gpu"
    core_count = 132

    def __init__(self, kind, capability, platform_version):
        self.device_kind, self.compute_capability = kind, capability
        self.client = SimpleNamespace(platform_version=platform_version)


@pytest.mark.parametrize(
    ("device", "found"),
    [
        (Gpu("NVIDIA H200", "9.0", "cuda 13000"), case("gpu")),
        (Gpu("NVIDIA H200", None, "cuda 13000"), case("gpu")),  # by its name
        (Gpu("AMD Instinct MI300X", "gfx942", "rocm 60200"), case("rocm")),
    ],
)
def test_gpus_of_two_makers_are_told_apart(device, found):
    mesh = Mesh(np.array([device]).reshape(1, 1, 1, 1), AXES)
    model = tiny_config("llama", head_dim=128)
    assert Case.of(mesh, PADDED, "bfloat16", model) == found
    assert attention.choose("auto", found) in ("tokamax", "tiles")


def test_without_cudnn_it_is_not_had(monkeypatch):
    monkeypatch.undo()

    def not_found():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", not_found)
    with pytest.raises(InputError, match="JAX finds no cuDNN here: cuDNN is not detec"):
        attention.choose("cudnn", case("gpu"))
    assert attention.choose("auto", case("gpu", capability=(8, 0))) == "tiles"
