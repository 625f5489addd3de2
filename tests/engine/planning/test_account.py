import dataclasses
import json

import jax
import pytest

from engine.config.lora import LoraConfig
from engine.config.run import ShardingConfig
from engine.parallel.sharding import AXES
from engine.planning.account import as_json, held_by, needed, on_host_by, take_account
from engine.planning.report import report, verdict
from engine.planning.targets import Target, parse_target
from tests.engine.planning.runs import tiny_run, tiny_step

CPU = parse_target("cpu:2")


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    run = tiny_run(tmp_path_factory.mktemp("model"), total_batch_size=4)
    return tiny_step(run, "cpu:2")


@pytest.fixture(scope="module")
def account(step):
    return take_account(step, CPU)


def parameters(step):
    return sum(x.size for x in jax.tree.leaves(step.operands[0].params))


def test_what_is_held_is_the_compilers_arguments(step, account):
    """14 bytes a parameter: 4 of the policy, 8 of AdamW, 2 of the reference."""
    held, count = held_by(step), parameters(step)
    compiled = step.request.step.lower(*step.operands).compile()
    memory = compiled.memory_analysis()
    # Beside them the numbers of the loss, some of which the step does not read.
    assert 0 <= memory.argument_size_in_bytes - held.total <= 64
    # Norms are whole on both devices.
    assert 4 * count / 2 <= held.parameters <= 4 * count / 2 + 3000
    assert held.optimizer == pytest.approx(2 * held.parameters, abs=16)
    assert held.reference == held.parameters / 2
    assert held.frozen == 0
    # Tokens of 4 rows of 64, 4 sequences' counts, 2 weights; positions and targets.
    assert held.batch == 4 * (4 * 64 + 4 + 2 + 2 * step.shape[1])
    assert account.gradients == held.parameters
    temporaries = memory.temp_size_in_bytes
    assert account.temporaries == temporaries > account.gradients
    assert account.activations == temporaries - account.gradients
    returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + returned + temporaries
    assert account.peak == peak


def test_an_adapters_base_is_held_once(tmp_path):
    run = tiny_run(tmp_path, lora=LoraConfig(r=4))
    held = held_by(tiny_step(run))
    full = held_by(tiny_step(dataclasses.replace(run, lora=None)))
    assert held.reference == 0
    assert held.frozen == full.reference
    assert held.parameters < held.frozen / 4
    assert held.optimizer == pytest.approx(2 * held.parameters, abs=16)


def test_references_are_those_of_training(tmp_path):
    def of(**options):
        return held_by(tiny_step(tiny_run(tmp_path, **options)))

    frozen = of().reference
    assert of(sync_ref_model=True).reference == 2 * frozen  # float32
    assert of(reference_free=True).reference == 0
    precomputed = of(precompute_ref_log_probs=True)
    assert precomputed.reference == 0
    assert precomputed.batch == of().batch + 4 * 2 * 4  # two values a pair


def test_a_reference_on_the_host_is_not_on_the_device(tmp_path):
    run = tiny_run(tmp_path, offload_ref_model=True)
    on_device = held_by(tiny_step(tiny_run(tmp_path)))
    for target in ("cpu:1", "v5e:1x1"):
        step = tiny_step(run, target)
        held = held_by(step)
        norms = 2 * (2 * 3 + 1) * 64  # bytes of bfloat16: two a layer, and the last
        assert held.reference == norms
        assert on_host_by(step) == on_device.reference - norms
        assert held.total == on_device.total - on_host_by(step)


def test_parameters_are_split_over_fsdp_and_tensor(tmp_path):
    whole = held_by(tiny_step(tiny_run(tmp_path))).parameters
    for sizes, parts in (((1, 2, 1, 2), 4), ((4, 1, 1, 1), 1), ((1, 2, 2, 1), 4)):
        sharding = ShardingConfig(**dict(zip(AXES, sizes, strict=True)))
        step = tiny_step(tiny_run(tmp_path, sharding=sharding), "cpu:4")
        assert whole / parts <= held_by(step).parameters <= whole / parts + 4000


def test_it_fits_where_the_peak_is_within_the_capacity(account, monkeypatch):
    def with_capacity(value):
        monkeypatch.setattr(Target, "capacity", property(lambda _: value))
        return account.fits

    assert with_capacity(account.peak)
    assert verdict(account).startswith("fits: ")
    assert not with_capacity(account.peak - 1)
    assert verdict(account).startswith("does not fit: ")
    # A TPU's compiler has placed what it did not refuse.
    tpu = dataclasses.replace(account, target=parse_target("v5e:1x2"))
    assert tpu.fits and not dataclasses.replace(tpu, refusal="x").fits


def test_time_is_a_roofline(account):
    assert account.times is None  # of a CPU nothing is known
    fast = dataclasses.replace(
        CPU.chip, flops_per_s=2e9, bytes_per_s=4e9, link_bytes_per_s=5e8
    )
    target = dataclasses.replace(CPU, chip=fast)
    times = dataclasses.replace(account, target=target).times
    assert times.products_s == account.work.total / 2e9
    assert times.memory_s == account.traffic.memory_bytes / 4e9
    wire = sum(x.wire for x in account.traffic.collectives)
    assert times.communication_s == wire / 5e8 > 0
    parts = times.products_s, times.memory_s, times.communication_s
    assert (times.least_s, times.most_s) == (max(parts), pytest.approx(sum(parts)))


@pytest.mark.parametrize(
    ("words", "bytes_"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
            "memory space hbm. Used 20.15G of 15.75G hbm. Exceeded hbm capacity by",
            int(20.15 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
            "for HLO temporaries (148.11G) exceeds available HBM (31.24G).",
            int(148.11 * 2**30),
        ),
        ("RESOURCE_EXHAUSTED: scoped memory of a kernel", None),
    ],
)
def test_a_refusal_says_how_much_it_would_take(words, bytes_):
    assert needed(words) == bytes_


def test_a_compiler_that_refuses_is_an_answer(step, monkeypatch):
    class Refusing:
        def trace(self, *operands):
            return step.request.step.trace(*operands)

        def lower(self, *operands):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Used 2.5G of 1.0G hbm."
            )

    refused = dataclasses.replace(step, request=step.request._replace(step=Refusing()))
    account = take_account(refused, CPU)
    assert not account.fits and account.peak == int(2.5 * 2**30)
    text = report(account, "x")
    assert "does not fit: 2.50 GiB of" in text
    assert "its compiler: RESOURCE_EXHAUSTED: Used 2.5G" in text
    assert "communication" not in text

    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: a defect")

    monkeypatch.setattr(Refusing, "lower", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a defect"):
        take_account(refused, CPU)


def test_the_report_and_its_json_say_the_same(account):
    text, values = report(account, "of nothing"), as_json(account)
    assert json.loads(json.dumps(values)) == values
    assert "cpu:2: 2 devices (CPU), compiled by jaxlib" in text
    assert "data=1, fsdp=2, tensor=1" in text
    assert "4 pairs in 1 microbatch of 2 pairs a device: 4 rows of 64 tokens" in text
    assert "shapes       of nothing" in text
    peak = f"{values['peak_bytes'] / 2**20:.1f} MiB"
    assert f"fits: {peak} of" in text
    [gathers] = [x for x in values["collectives"] if x["kind"] == "all-gather"]
    assert gathers["axes"] == ["fsdp"] and gathers["group"] == 2
    assert "all-gather over fsdp (2)" in text
    assert "time: not predicted" in text
    assert values["flops_total"] == account.work.total
