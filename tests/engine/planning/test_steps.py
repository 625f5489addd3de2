import pytest

from engine.config.run import ShardingConfig
from engine.errors import InputError
from engine.planning.devices import devices_of
from engine.planning.targets import parse_target
from tests.engine.planning.runs import absent_devices, tiny_run, tiny_step

WIDE = {"hidden_size": 128, "num_attention_heads": 8}


@pytest.fixture
def tpu(monkeypatch):
    target = "v6e:1x1"
    absent_devices(target, monkeypatch)
    return target


def test_the_largest_batch_is_planned(tmp_path):
    step = tiny_step(tiny_run(tmp_path, gradient_accumulation_steps=2), "cpu:2")
    assert step.run.plan.grid == (2, 2, 1)
    # 32 scored tokens of each of two sequences, in units of 128.
    assert step.shape == (64, 128)
    assert step.positions == 2 * 2 * 2 * 64
    packed = tiny_step(tiny_run(tmp_path, packing=True), "cpu:2")
    assert packed.positions == 2 * 4 * 64 and packed.shape == (256, 128)


def test_a_workspace_that_is_too_small_on_a_tpu_is_refused(tmp_path, tpu):
    def run(workspace):
        return tiny_run(tmp_path, WIDE, workspace_bytes=workspace)

    tiny_step(run(2**20), tpu)
    with pytest.raises(InputError, match="=1024 is too small for the gradients of 256"):
        tiny_step(run(1024), tpu)


def test_axes_need_not_be_whole_dimensions_of_a_torus(tmp_path, tpu):
    run = tiny_run(tmp_path, sharding=ShardingConfig(sequence=8))
    mesh = run.sharding.mesh(devices_of(parse_target("v5p:4x4x4")))
    assert (mesh.shape["fsdp"], mesh.shape["sequence"]) == (8, 8)
    assert len({device.id for device in mesh.devices.flat}) == 64


def test_what_training_refuses_is_refused(tmp_path):
    for sharding, message in (
        (ShardingConfig(fsdp=3), "does not fit 2 devices"),
        (ShardingConfig(data=2, fsdp=1), None),
    ):
        run = tiny_run(tmp_path, sharding=sharding)
        if message is None:
            assert tiny_step(run, "cpu:2").run.plan.grid == (1, 2, 2)
            continue
        with pytest.raises(InputError, match=message):
            tiny_step(run, "cpu:2")
    with pytest.raises(InputError, match="total_batch_size=3 pairs cannot be split"):
        tiny_step(tiny_run(tmp_path, total_batch_size=3), "cpu:2")


@pytest.fixture
def gpu(monkeypatch):
    target = "h200:1"
    absent_devices(target, monkeypatch)
    return target


@pytest.mark.parametrize("name", ["triton", "xla"])
def test_an_implementation_may_be_named_for_a_gpu(name, tmp_path, gpu):
    """Its kernels ask for a compute capability."""
    step = tiny_step(tiny_run(tmp_path, implementation=name), gpu)
    assert step.run.mesh.devices.flat[0].device_kind == "NVIDIA H200"


def test_a_gpus_step_compiles_with_its_kernels(tmp_path, gpu):
    """On one device: there a kernel that asks which one it is on does not compile."""
    step = tiny_step(tiny_run(tmp_path, implementation="mosaic_gpu"), gpu)
    text = step.request.step.lower(*step.operands).compile().as_text()
    for kernel in ("token_logprobs_forward", "sequence_sums", "sequence_sums_gradient"):
        assert kernel in text
