import jax
import pytest

from engine.errors import InputError
from engine.planning import targets
from engine.planning.devices import devices_of
from engine.planning.targets import apply_environment, parse_target
from tests.engine.planning.runs import absent_devices


@pytest.mark.parametrize(
    ("text", "devices", "name"),
    [
        ("v5e:4x4", 16, "TPU v5e"),
        ("V5P:4x4x4", 64, "TPU v5p"),
        ("v6e:1x1", 1, "TPU v6e"),
        ("tpu7x:2x2x1", 8, "TPU7x"),  # two devices a chip
        ("h100:8", 8, "NVIDIA H100"),
        ("h200", 1, "NVIDIA H200"),
        ("cpu:3", 3, "CPU"),
    ],
)
def test_a_target_is_a_kind_and_a_number_of_devices(text, devices, name):
    target = parse_target(text)
    assert (target.count, target.chip.name) == (devices, name)
    assert parse_target(target.text) == target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a100:8", "'a100:8': there is no device 'a100'"),
        ("", "there is no device ''"),
        ("v5e", "has 2 dimensions; write them as v5e:4x4"),
        ("v5e:4x4x4", "has 2 dimensions; write them as v5e:4x4"),
        ("v5p:4x4", "has 3 dimensions; write them as v5p:2x2x1"),
        ("v6e:0x4", "'0x4' is no slice of TPU v6e"),
        ("h200:0", "'0' is no number of devices; write h200:1 or h200:8"),
        ("h200:16", "one host has at most 8 of them"),
        ("cpu:many", "'many' is no number"),
    ],
)
def test_what_is_no_target_is_refused_in_one_line(text, message):
    with pytest.raises(InputError, match="--target") as caught:
        parse_target(text)
    assert message in str(caught.value)


def test_the_environment_is_that_of_the_compiler():
    environment = {"JAX_PLATFORMS": "cuda", "HOME": "/"}
    apply_environment(parse_target("h200:8").environment, environment)
    assert environment == {
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_PLATFORMS": "cpu",
        "HOME": "/",
    }
    apply_environment({"HOME": None, "TPU_SKIP_MDS_QUERY": "1"}, environment)
    assert "HOME" not in environment and environment["TPU_SKIP_MDS_QUERY"] == "1"
    assert parse_target("v5e:4x4").environment["JAX_PLATFORMS"] == "cpu"
    assert parse_target("cpu:3").environment["JAX_NUM_CPU_DEVICES"] == "3"


def test_a_gpu_has_the_share_of_its_memory_that_jax_takes(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    target = parse_target("h200:1")
    assert target.capacity == 112_500_000_000
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert target.capacity == 135_000_000_000
    assert target.capacity_words.startswith("0.9 of its memory")
    for wrong in ("1.5", "0", "half"):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(InputError, match="MEM_FRACTION=.* is no share"):
            _ = target.capacity


def test_target_files_of_gpus_say_what_the_table_says():
    for name in ("h100", "h200"):
        target = parse_target(f"{name}:8")
        text = target.topology["target_config"]
        assert f"device_memory_size: {target.chip.memory_bytes}\n" in text
        assert f"memory_bandwidth: {int(target.chip.bytes_per_s)}\n" in text
        assert target.chip.name in text


def test_cpu_devices_are_those_of_the_process():
    assert devices_of(parse_target("cpu:8")) == jax.devices("cpu")[:8]
    with pytest.raises(InputError, match="JAX has 8 CPU devices in this process"):
        devices_of(parse_target("cpu:9"))


def test_a_compiler_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("engine.planning.devices.find_spec", lambda name: None)
    for text, package in (("v5e:4x4", "libtpu"), ("h100:8", "jax-cuda13-plugin")):
        with pytest.raises(InputError, match=f"pip install {package}, which needs no"):
            devices_of(parse_target(text))


def test_devices_of_a_slice_that_is_not_here(monkeypatch):
    found = absent_devices("v5e:2x4", monkeypatch)
    assert [x.device_kind for x in found] == ["TPU v5 lite"] * 8
    assert len(devices_of(parse_target("tpu7x:2x2x1"))) == 8
    # Of a part of a host, too.
    for text, number in (("v6e:1x1", 1), ("v5e:1x4", 4), ("tpu7x:1x1x1", 2)):
        assert len(devices_of(parse_target(text))) == number
    with pytest.raises(InputError, match="--target v5e:3x5: its compiler cannot be"):
        devices_of(parse_target("v5e:3x5"))


def test_peak_rates_are_those_that_jax_knows():
    """Of TPUs, in `jax/_src/tpu_info.py`, to what the makers round."""
    tpu_info = pytest.importorskip("jax._src.tpu_info")
    for name, version, cores in (
        ("v5e", "v5e", 1),
        ("v5p", "v5p", 2),
        ("v6e", "v6e", 1),
        ("tpu7x", "7x", 1),
    ):
        known = tpu_info.get_tpu_info_for_chip(tpu_info.ChipVersion(version), cores)
        chip = targets.CHIPS[name]
        flops = cores * known.bf16_ops_per_second  # of each core
        assert chip.flops_per_s == pytest.approx(flops, rel=0.01)
        bandwidth = cores * known.mem_bw_bytes_per_second
        if name == "v5p":
            assert bandwidth == 2460e9  # where its maker says 2,765
        else:
            assert chip.bytes_per_s == pytest.approx(bandwidth, rel=0.01)
