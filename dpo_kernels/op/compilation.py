"""Many programs compiled at once, while others run."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

THREADS = 6  # some of them wait for the device, on which XLA tries out products


class Compiler:
    """Lowers in one thread, which is Python's work, and compiles in several."""

    def __init__(self, threads: int = THREADS):
        self._lowerer = ThreadPoolExecutor(1)
        self._compilers = ThreadPoolExecutor(threads)

    def submit(self, call: Callable, *shapes: Any, x64: bool = False) -> Future:
        """What will be the compiled program, or why there is none."""

        def lower() -> jax.stages.Lowered:
            with jax.enable_x64(x64):
                return jax.jit(call).lower(*shapes)

        def job() -> jax.stages.Compiled:
            return self._lowerer.submit(lower).result().compile()

        return self._compilers.submit(job)

    def close(self) -> None:
        """Forget what has not been begun."""
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._lowerer.shutdown(wait=False, cancel_futures=True)
