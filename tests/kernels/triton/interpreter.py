"""Runs the kernels of the `triton` backend on the CPU, by Triton's own interpreter.

`launch` stands in for `triton._launch`, so that host code and kernels are tested
together, under jit. Every address is checked against the arrays of the launch, and what
no kernel writes is NaN. The interpreter is entered without TRITON_INTERPRET, which
would rule out compiling in the same process.
"""

import contextlib
import threading
import types
import warnings
from typing import Any
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

from dpo_kernels.triton import kernels as triton_kernels

_TYPES = {
    "bfloat16": tl.bfloat16,
    "float16": tl.float16,
    "float32": tl.float32,
    "int32": tl.int32,
}
_lock = threading.Lock()


def launch(kernel, arrays, out, tile, programs, constants):
    """The outputs of a kernel, as `triton._launch` returns them."""
    constants = constants | {
        "BLOCK_T": tile.block_t,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
        "GROUP_T": tile.group_t,
    }
    function = getattr(triton_kernels, kernel)

    def run(*inputs: jax.Array) -> tuple[np.ndarray, ...]:
        results = [np.full(x.shape, np.nan, x.dtype) for x in out]
        buffers = [*(np.array(x) for x in inputs), *results]
        with _lock:
            interpret(function, buffers, programs, constants)
        return tuple(results)

    return jax.pure_callback(run, out, *arrays)


def interpret(
    function: JITFunction,
    buffers: list[np.ndarray],
    programs: int,
    constants: dict[str, Any],
) -> None:
    """Run `programs` programs, one after the other."""
    pointers = [
        tl.tensor(TensorHandle(np.array([x.ctypes.data], np.uint64), pointer), pointer)
        for x in buffers
        for pointer in [tl.pointer_type(_TYPES[x.dtype.name])]
    ]
    with _interpreted(buffers):
        for program in range(programs):
            interpreter.interpreter_builder.set_grid_dim(programs, 1, 1)
            interpreter.interpreter_builder.set_grid_idx(program, 0, 0)
            function(*pointers, **constants)


def _call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
    return interpreter.InterpretedFunction(self.fn).rewrite()(*args, **kwargs)


@contextlib.contextmanager
def _interpreted(buffers: list[np.ndarray]):
    # tl.core is what Triton's own functions, tl.sum for one, see as their language.
    languages = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    scope = interpreter._patch_lang(languages)
    patches = {
        "create_masked_load": _checked_load(buffers),
        "create_masked_store": _checked_store(buffers),
        "create_dot": _dot,
        "cast_impl": _cast,
    }
    try:
        with (
            mock.patch.object(JITFunction, "__call__", _call),
            mock.patch.multiple(InterpreterBuilder, **patches),
            np.errstate(all="ignore"),
            warnings.catch_warnings(),
        ):
            # Padding rows hold NaN, of which numpy warns.
            warnings.simplefilter("ignore")
            yield
    finally:
        scope.restore()


def _check(buffers: list[np.ndarray], pointers: TensorHandle, mask: TensorHandle):
    """Every address that is used lies in an array; the first one says in which."""
    used = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    if not used.size:
        return
    spans = [(x.ctypes.data, x.ctypes.data + x.nbytes) for x in buffers]
    within = [low <= used.min() and used.max() < high for low, high in spans]
    assert any(within), "an address outside of the arrays"


def _checked_load(buffers: list[np.ndarray]):
    original = InterpreterBuilder.create_masked_load

    def load(self, ptrs, mask, other, *rest):
        _check(buffers, ptrs, mask)
        return original(self, ptrs, mask, other, *rest)

    return load


def _checked_store(buffers: list[np.ndarray]):
    original = InterpreterBuilder.create_masked_store

    def store(self, ptrs, value, mask, *rest):
        _check(buffers, ptrs, mask)
        return original(self, ptrs, value, mask, *rest)

    return store


def _dot(self, a, b, d, *_):
    # As it is, the interpreter multiplies the bits of bfloat16 as integers.
    product = np.matmul(_float32(a), _float32(b)) + d.data
    return TensorHandle(product, d.dtype.scalar)


def _float32(x: TensorHandle) -> np.ndarray:
    if x.dtype.scalar == tl.bfloat16:
        return x.data.view(ml_dtypes.bfloat16).astype(np.float32)
    return x.data.astype(np.float32)


_cast_as_it_is = InterpreterBuilder.cast_impl


def _cast(self, source, to):
    # As it is, the interpreter truncates to bfloat16 where a GPU rounds to nearest.
    if (source.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
        bits = source.data.astype(ml_dtypes.bfloat16).view(np.uint16)
        return TensorHandle(bits, tl.bfloat16)
    return _cast_as_it_is(self, source, to)
