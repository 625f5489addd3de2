"""Programs compiled before a run begins, for each shape of batch that it will meet."""

import contextlib
import ctypes
import gc
import logging
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from engine.data.cache import default_cache_dir
from engine.errors import InputError, one_line
from engine.parallel.batch import Batch
from engine.training.compiler_options import known_options
from engine.training.memory import Taken, taken_by

logger = logging.getLogger(__name__)

Shape = tuple[int, int]  # Batch.shape
_KEPT_BYTES = 4 * 2**30  # of programs; those used longest ago go first


class TooLittleMemory(InputError):
    """A program, or its arrays, for which a device has no room."""


class Request(NamedTuple):
    """A step to compile."""

    step: Any  # jitted
    arguments: dict[Shape, tuple[Any, ...]]  # abstract ones, for each shape of batch


class Compiled:
    """A step, compiled for some shapes of batches.

    Calling it with arrays of another type, or a batch of another shape, is an error:
    nothing is ever compiled during a run.
    """

    def __init__(self, programs: Mapping[Shape, jax.stages.Compiled]):
        self.programs = programs

    def taken(self, platform: str) -> Taken | None:
        """What the program that takes most of a device takes of it."""
        found = [taken_by(program, platform) for program in self.programs.values()]
        known = [taken for taken in found if taken is not None]
        return max(known, key=lambda taken: taken.peak, default=None)

    def __call__(self, *arguments: Any) -> Any:
        """The step's result."""
        (batch,) = (x for x in arguments if isinstance(x, Batch))
        return self.programs[batch.shape](*arguments)


def keep_programs() -> None:
    """Let JAX keep compiled programs in the program's cache folder.

    A cache that the user has chosen, or switched off, stays as it is. Runs may share
    the folder: JAX writes programs in place, but a cache that has a size to keep to is
    locked by who reads or writes it, so nobody is given what is still being written.
    """
    config = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    folder = default_cache_dir() / "compiled"
    config.update("jax_compilation_cache_dir", str(folder))
    config.update("jax_compilation_cache_max_size", _KEPT_BYTES)
    config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def compile_all(requests: list[Request]) -> list[Compiled]:
    """Compile steps, all of their shapes at once."""
    began = time.perf_counter()
    count = sum(len(request.arguments) for request in requests)
    logger.info("compiling %d program%s ...", count, "s" * (count != 1))
    with (
        enough_memory(),
        known_options(),
        ThreadPoolExecutor(max_workers=min(count, os.cpu_count() or 1)) as pool,
    ):
        futures = [
            {
                # Lowering is Python's work; compiling is not, and runs meanwhile.
                shape: pool.submit(request.step.lower(*arguments).compile)
                for shape, arguments in request.arguments.items()
            }
            for request in requests
        ]
        steps = [
            Compiled({shape: future.result() for shape, future in programs.items()})
            for programs in futures
        ]
    _return_freed_memory()
    logger.info("compiled in %.1f s", time.perf_counter() - began)
    return steps


def _return_freed_memory() -> None:
    """What a compiler has freed goes back to the system, where the C library can.

    glibc keeps it for the threads that had it: 0.4 GB a program, as long as the run.
    """
    gc.collect()  # what is in cycles is not freed before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """Says in one line what to do where a device has too little memory.

    Raises:
        TooLittleMemory: in place of the runtime's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLittleMemory(
            f"a device has too little memory ({one_line(error)}); raise "
            "gradient_accumulation_steps, lower max_length or total_batch_size, set "
            "model.remat to full, or shard the model over more devices"
        ) from error
