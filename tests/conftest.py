"""Eight CPU devices, strict dtypes and ranks, no network; all before jax starts."""

import gc
import logging
import os
import tempfile
from pathlib import Path

from tests import environment

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = environment.xla_flags(os.environ.get("XLA_FLAGS", ""))
if environment.OLDER not in os.environ["XLA_FLAGS"]:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Workers compile for absent TPUs at once; libtpu takes them for users of one TPU.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Nothing is written to the home directory.
_caches = tempfile.TemporaryDirectory(prefix="dpo-tests-")
os.environ["DPO_CACHE"] = f"{_caches.name}/dpo"
os.environ["HF_DATASETS_CACHE"] = f"{_caches.name}/datasets"

import jax  # noqa: E402
import pytest  # noqa: E402

import tests.typechecker  # noqa: E402, F401, named in pyproject.toml

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Of a place in Python its line alone: to write whole stacks down is a twentieth of
# what a short run takes. What an exception says stays as it is.
jax.config.update("jax_include_full_tracebacks_in_locations", False)
# Of this process alone: what compiles for absent devices cannot read it back, and what
# dumps a compiler's files has to compile.
_compiled = environment.compilation_cache(Path(__file__).parent.parent)
jax.config.update("jax_compilation_cache_dir", str(_compiled))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_configure(config: pytest.Config) -> None:
    """Workers leave the folder alone: one process trims it, before they start."""
    if not hasattr(config, "workerinput"):
        environment.trim(_compiled)


def pytest_collection_finish() -> None:
    """What is imported by now stays: to look for garbage in it is 4 % of the time.

    To look less often than at every 700 objects saves as much again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(autouse=True)
def _loggers_as_before():
    """`dpo` sets the level of its logger for the process: not for the next test."""
    logger = logging.getLogger("engine")
    level = logger.level
    yield
    logger.setLevel(level)
