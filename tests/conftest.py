"""Eight CPU devices, strict dtypes and ranks, no network; all before jax starts."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Nothing is written to the home directory.
_caches = tempfile.TemporaryDirectory(prefix="dpo-tests-")
os.environ["DPO_CACHE"] = f"{_caches.name}/dpo"
os.environ["HF_DATASETS_CACHE"] = f"{_caches.name}/datasets"

import jax  # noqa: E402

import tests.typechecker  # noqa: E402, F401, named in pyproject.toml

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
