"""The devices' memory in lines of metrics: there where a device counts it."""

import json
from types import SimpleNamespace

from engine.reports.page import page
from engine.reports.runs import read_run
from engine.training.memory import fullest, memory_metrics, taken_by
from tests.engine.training.runs import one_device


def test_the_fullest_device_of_those_that_count():
    full = {"peak_bytes_in_use": 7, "bytes_limit": 9, "bytes_in_use": 1}
    other = {"peak_bytes_in_use": 5, "bytes_limit": 8}
    found = fullest([full, other, None])
    assert found == {"memory/peak_bytes": 7, "memory/limit_bytes": 8}
    assert fullest([{"peak_bytes_in_use": 7}]) == {"memory/peak_bytes": 7}
    assert fullest([{"bytes_in_use": 3, "bytes_limit": 9}]) == fullest([None]) == {}


def test_a_cpu_has_none():
    assert memory_metrics(one_device()) == {}


def test_the_report_has_it_where_it_is_known(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Memory" not in page([read_run(tmp_path)], {})
    lines[0]["memory/peak_bytes"], lines[1]["memory/peak_bytes"] = 2**30, 3 * 2**29
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = page([read_run(tmp_path)], {})
    assert "<figcaption>Memory<" in text and "1.50 GiB" in text
    assert '"points":[[1,1.0],[2,1.5]]' in text  # GiB in the curve, too


MEMORY = SimpleNamespace(
    argument_size_in_bytes=100,
    output_size_in_bytes=90,
    alias_size_in_bytes=80,
    generated_code_size_in_bytes=5,
    temp_size_in_bytes=70,
    peak_memory_in_bytes=150,
    host_argument_size_in_bytes=0,
)


def taken(platform: str, **changes: int):
    memory = SimpleNamespace(**vars(MEMORY) | changes)
    return taken_by(SimpleNamespace(memory_analysis=lambda: memory), platform)


def test_of_a_tpu_the_peak_is_what_its_compiler_says():
    assert taken("tpu") == (115, 35)
    assert taken("cpu") == (115, 70)
    assert taken("tpu", peak_memory_in_bytes=0) == (115, 70)  # not said
    # Arguments in the host's memory are in that peak, too, and so are temporaries,
    # which the compiler may have fewer of on the device.
    assert taken("tpu", host_argument_size_in_bytes=30) == (115, 5)
    assert taken("tpu", temp_size_in_bytes=20) == (115, 20)
