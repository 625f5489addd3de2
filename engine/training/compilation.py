"""Programs compiled before a run begins, for each shape of batch that it will meet."""

import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from engine.data.cache import default_cache_dir
from engine.parallel.batch import Batch

logger = logging.getLogger(__name__)

Shape = tuple[int, int]  # Batch.shape
# A jitted step, which of its arguments is the batch, and the abstract ones by shape.
Request = tuple[Any, int, dict[Shape, tuple[Any, ...]]]


class Compiled:
    """A step, compiled for some shapes of batches.

    Calling it with arrays of another type, or a batch of another shape, is an error:
    nothing is ever compiled during a run.
    """

    def __init__(self, programs: Mapping[Shape, jax.stages.Compiled], batch: int):
        """`batch`: which argument is the batch."""
        self.programs = programs
        self._batch = batch

    def __call__(self, *arguments: Any) -> Any:
        """The step's result."""
        batch = arguments[self._batch]
        assert isinstance(batch, Batch)
        return self.programs[batch.shape](*arguments)


def keep_programs() -> None:
    """Let JAX keep compiled programs in the program's cache folder.

    A cache that the user has chosen, or switched off, stays as it is.
    """
    config = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    folder = default_cache_dir() / "compiled"
    config.update("jax_compilation_cache_dir", str(folder))
    config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def compile_all(requests: list[Request]) -> list[Compiled]:
    """Compile jitted steps, all of their shapes at once."""
    began = time.perf_counter()
    count = sum(len(arguments) for _, _, arguments in requests)
    logger.info("compiling %d program%s ...", count, "s" * (count != 1))
    with ThreadPoolExecutor(max_workers=max(1, count)) as pool:
        futures = [
            {
                # Lowering is Python's work; compiling is not, and runs meanwhile.
                shape: pool.submit(function.lower(*arguments).compile)
                for shape, arguments in by_shape.items()
            }
            for function, _, by_shape in requests
        ]
        steps = [
            Compiled({shape: x.result() for shape, x in programs.items()}, batch)
            for programs, (_, batch, _) in zip(futures, requests, strict=True)
        ]
    seconds = time.perf_counter() - began
    logger.info("compiled in %.1f s", seconds)
    return steps
