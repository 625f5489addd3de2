"""Lets the kernels of `sequence_sums` run on the CPU, in their interpreters."""

import contextlib
import threading

import jax
import numpy as np
import pytest

from dpo_kernels.op.devices import Device, pretended
from dpo_kernels.triton import call as jax_triton_call

H200 = Device(platform="gpu", kind="NVIDIA H200", num_cores=132, capability=(9, 0))
V6E = Device(platform="tpu", kind="TPU v6 lite", num_cores=1)
LOCK = threading.Lock()  # Triton's interpreter is one for the process


@contextlib.contextmanager
def running(implementation, monkeypatch, capfd=None):
    """Let the kernels of an implementation run here, and look for races."""
    if implementation == "xla":
        yield
        return
    if implementation == "pallas_tpu":
        from jax.experimental.pallas import tpu as pltpu

        tpu = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="raise")
        with pretended(V6E), pltpu.force_tpu_interpret_mode(tpu):
            yield
        return
    if implementation == "triton":
        call = interpreted_triton(monkeypatch)
        monkeypatch.setattr(jax_triton_call, "triton_call", lambda: call)
        with pretended(H200):
            yield
        return
    from jax.experimental.pallas import mosaic_gpu as plgpu

    params = plgpu.InterpretGPUParams(detect_races=True, out_of_bounds_reads="raise")
    with pretended(H200), plgpu.force_gpu_interpret_mode(params):
        yield
    if capfd is not None:
        assert "RACE DETECTED" not in capfd.readouterr().out


def interpreted_triton(monkeypatch):
    """Stands in for jax-triton's entry point and its argument of output types."""
    pytest.importorskip("triton", reason="the test environment lacks Triton")

    from tests.kernels.triton import interpreter as triton_interpreter

    original = triton_interpreter.interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        # As it is, int(array of one entry), which NumPy 2.5 refuses.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(triton_interpreter.interpreter, "_patch_lang_tensor", patch)

    def call(*arrays, kernel, grid, out_shape, **rest):
        for of_the_compiler in ("name", "num_warps", "compute_capability"):
            rest.pop(of_the_compiler)

        def run(*inputs):
            results = [np.full(x.shape, np.nan, x.dtype) for x in out_shape]
            buffers = [*(np.array(x) for x in inputs), *results]
            with LOCK:
                triton_interpreter.interpret(kernel, buffers, grid[0], rest)
            return tuple(results)

        return jax.pure_callback(run, tuple(out_shape), *arrays)

    return call, "out_shape"
